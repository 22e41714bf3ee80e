"""Measurements of speed: interleaved rounds, ratios of medians, budgets."""
