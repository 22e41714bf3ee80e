"""Cores that this process may use."""

import os


def available() -> int:
  """Their number: those that the scheduler allows, not those that the machine has."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def batches_at_once() -> int:
  """Batches that are made at once. One has too few rows to keep many cores busy; two leave them idle when both end."""
  return max(3, min(16, available() // 4))
