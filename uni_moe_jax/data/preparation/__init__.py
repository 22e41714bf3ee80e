"""Preparation of own data: the input in shards, a function per shard, a merge, and a function per file of records."""
