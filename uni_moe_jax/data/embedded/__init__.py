"""Data sets built from installed packages."""
