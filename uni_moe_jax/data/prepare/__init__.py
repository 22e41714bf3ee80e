"""From rows to prepared data: scan, merge, write."""
