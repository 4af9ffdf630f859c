"""Whether the MoE blocks of two models have one origin: from router rows, and from small samples where these do not tell."""
