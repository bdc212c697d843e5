"""Every normalizer as data, and what can be computed from it. Needs NumPy and the standard library only."""
