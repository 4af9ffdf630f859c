"""Processes, memory, progress bars, warnings."""
