"""One trainer: optimizer, step, loop, checkpoints."""
