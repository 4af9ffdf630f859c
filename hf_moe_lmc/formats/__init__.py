"""Storage formats of quantized weights: which tensors make up one, its values, and how values are written again."""
