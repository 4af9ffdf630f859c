"""`python -m hf_moe_lmc`."""

import sys

from hf_moe_lmc.cli.command_line import main

sys.exit(main())
