"""Fixed protocols that turn predictions into numbers, beside chance and simple baselines."""
