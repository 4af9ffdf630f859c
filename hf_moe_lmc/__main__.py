"""`python -m hf_moe_lmc`."""

from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.runtime.processes import leave

leave(main())
