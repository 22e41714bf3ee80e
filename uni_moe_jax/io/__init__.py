"""Paths on disks and in buckets, files, locks."""
