"""Checkpoints on disk and on the Hub: headers, configuration, vocabulary, quantisation, pairs of them."""
