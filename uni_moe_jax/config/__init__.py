"""The run configuration: every field with its default, and the plan that follows from it."""

from uni_moe_jax.config.schema import base, evaluator, target_set, task

__all__ = ['base', 'evaluator', 'target_set', 'task']
