"""Merges that leave the straight line: repaired without data, or fitted on calibration text and guarded by it."""
