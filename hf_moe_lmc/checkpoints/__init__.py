"""Checkpoints on disk and on the Hub: headers, configuration, vocabulary, quantization, pairs of them."""
