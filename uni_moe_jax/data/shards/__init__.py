"""Prepared data: records by index, on disks and in buckets."""
