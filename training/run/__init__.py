"""A training run: its options, its folder, what it logs, and weights to begin with."""
