"""Tokenizers, templates and words."""
