"""A page and a JSON service for an exported model: a front without jax, and one worker that owns the model."""
