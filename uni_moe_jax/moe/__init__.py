"""Conditional mixtures of experts: a router decides, an expert computes."""
