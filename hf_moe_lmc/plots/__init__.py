"""Plots of plain values: what they say, how they look, and the page that shows them all."""
