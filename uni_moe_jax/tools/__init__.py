"""Preflight and benchmarks."""
