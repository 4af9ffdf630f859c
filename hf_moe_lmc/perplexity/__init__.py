"""Text, losses, the barrier and its statistics. Nothing in here knows of experts."""
