"""Outputs on disk: checkpoints streamed and interpolated; an output appears whole or not at all."""
