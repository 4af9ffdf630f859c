"""Proof that a family's description is right, on small random models of its configuration."""
