"""Datasets built from installed packages."""
