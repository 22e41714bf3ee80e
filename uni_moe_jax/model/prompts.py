"""Prompts: what prompt tuning adds to a finished model, few parameters beside the model's own.

Deep prompts are P rows per layer that every token may attend to: they pass the layer's own norm and its projection to
keys and values, are attended beside the other keys, and never become tokens themselves (published; their condition is
that of the sequence's first segment). Prefix and label prompts are tokens between `spe` and the data: raw rows without
LayerNorm, position or type (published), under the condition of the first segment.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from uni_moe_jax.model.sequences import InputSequence
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe.layers import param

# Which table each side reads, by `prompt_sharing`: (inputs, targets).
TABLES = {'shared': ('input', 'input'), 'separate': ('input', 'target'), 'inputs': ('input', None)}
_STD = 0.02


def prompt_table(spec: ModelSpec, is_target: bool) -> str | None:
  """Name of the table of deep and prefix prompts that a side reads, or None."""
  return TABLES[spec.prompt_sharing][is_target]


def _tables(module: nn.Module, rows: int) -> dict[str, jax.Array]:
  """The parameters [1, rows, D] of every table that some side reads."""
  axes = {'prompt': rows, 'embed': module.spec.width}
  return {name: param(module, name, nn.initializers.normal(_STD), axes)[None]
          for name in dict.fromkeys(TABLES[module.spec.prompt_sharing]) if name}


class DeepPrompts(nn.Module):
  """The rows of one layer: one table for both sides, one for each, or one for inputs alone."""
  spec: ModelSpec

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    """{table: [1, P, D]}."""
    return _tables(self, self.spec.num_deep_prompts)


class TokenPrompts(nn.Module):
  """Learned tokens after `spe`: one for each class of a target set, then the prefix prompts of a side."""
  spec: ModelSpec

  def setup(self):
    spec = self.spec
    self.prefix = _tables(self, spec.num_prefix_prompts) if spec.num_prefix_prompts else {}
    self.labels = {
        name: param(self, f'label_{name}', nn.initializers.zeros, {'class': size, 'embed': spec.width})
        for name, size in spec.label_prompts}

  def __call__(self, sequence: InputSequence) -> list[jax.Array]:
    """The tokens that follow `spe`, arrays [B, n, D]; none where the model has none for this sequence."""
    layout = sequence.layout
    tokens = [] if layout.label_set is None else [self.labels[layout.label_set][sequence.classes][:, None]]
    table = prompt_table(self.spec, layout.is_target)
    if table in self.prefix:
      tokens.append(jnp.broadcast_to(self.prefix[table], (sequence.ids.shape[0], *self.prefix[table].shape[1:])))
    return tokens
