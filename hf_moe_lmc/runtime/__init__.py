"""Processes, memory, progress bars."""
