"""The config of a run: fields, checks, and the plan that data, training and evaluation share."""

from uni_moe_jax.config.arguments import arguments
from uni_moe_jax.config.schema import base
from uni_moe_jax.config.task_schema import evaluator, target_set, task

__all__ = ['arguments', 'base', 'evaluator', 'target_set', 'task']
