"""Helpers that depend on no model, data or task."""
