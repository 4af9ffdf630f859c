"""The group elements: permutations, signs and scales of experts and hidden units."""
