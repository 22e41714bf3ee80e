"""Meshes, sharding, many processes."""
