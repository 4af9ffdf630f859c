"""Checkpoints written: streamed, interpolated, whole or not there."""
