"""What the paper reports, as far as this project has it: the numbers beside ours. NeurIPS 2025, arXiv 2509.11348 v2."""

from __future__ import annotations

# Table 2: data, layer -> (rank, its deviation, L, its deviation) by expert weights, and by gate weights; of 24 orders.
TABLE_2: dict[tuple[str, int], tuple[tuple[float, float, float, float], tuple[float, float, float, float]]] = {
    ("CIFAR-10", 1): ((2.50, 1.50, 2.12, 0.42), (3.00, 1.00, 3.42, 0.55)),
    ("CIFAR-10", 4): ((2.10, 0.50, 1.04, 0.32), (2.60, 0.92, 1.54, 0.44)),
    ("CIFAR-10", 8): ((2.70, 0.46, 0.60, 0.27), (2.90, 0.30, 0.74, 0.17)),
    ("CIFAR-10", 12): ((4.60, 2.00, 0.13, 0.05), (3.80, 1.66, 0.09, 0.03)),
    ("CIFAR-100", 1): ((2.80, 0.40, 3.17, 0.25), (2.90, 0.70, 2.73, 1.03)),
    ("CIFAR-100", 4): ((3.60, 1.20, 1.15, 0.55), (2.70, 1.00, 2.03, 0.93)),
    ("CIFAR-100", 8): ((3.30, 0.78, 0.67, 0.14), (3.20, 0.87, 1.13, 0.55)),
    ("CIFAR-100", 12): ((3.40, 0.92, 0.07, 0.03), (4.20, 0.89, 0.11, 0.04)),
}
