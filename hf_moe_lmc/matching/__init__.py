"""Weight matching: the symmetry that takes one model close to another."""
