"""Speed, each figure by one command of the repository: `python -m benchmarks.NAME`; see docs/guides/benchmarks.md."""
