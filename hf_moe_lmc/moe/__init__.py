"""The view: families as data, and every MoE block as experts and a router."""
