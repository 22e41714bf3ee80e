"""Speed benchmarks: interleaved rounds, ratios of medians, budgets."""
