"""`python -m hf_moe_lmc`."""

import sys

from hf_moe_lmc.cli import main

sys.exit(main())
