"""The command line: verbs over the API."""

from hf_moe_lmc.cli.command_line import main

__all__ = ["main"]
