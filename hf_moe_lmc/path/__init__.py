"""The path between two models, evaluated: which weights stand where, when."""
