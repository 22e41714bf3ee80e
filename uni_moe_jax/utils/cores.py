"""Cores that this process may use."""

import os


def available() -> int:
  """Their number: those that the scheduler allows, not those that the machine has."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
