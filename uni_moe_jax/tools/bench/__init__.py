"""Speed benchmarks: interleaved rounds, medians of the rounds' own ratios, budgets."""
