"""Interference, expert usage, router ablation and adaptation study."""
