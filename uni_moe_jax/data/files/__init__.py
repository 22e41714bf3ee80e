"""Data sets from people's own files."""
