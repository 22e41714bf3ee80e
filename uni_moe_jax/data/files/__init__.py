"""Datasets from a user's own files, and TFDS datasets."""
