"""Whether the MoE blocks of two models have one origin: judged from router rows, and from small samples where these do not tell."""
