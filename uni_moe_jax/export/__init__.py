"""Finished models for others: merged dense kernels, artifacts, other layouts."""
