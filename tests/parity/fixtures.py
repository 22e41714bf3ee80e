"""Golden numbers of the published system: models and cases, built from the manifest alone.

Every array that a test reads is recorded, so that a case can report its unread arrays.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import numpy as np

from uni_moe_jax.config.schema import PUBLISHED_TEMPERATURES
from uni_moe_jax.convert import torch_layout
from uni_moe_jax.model.spec import ModelSpec

_DEFAULT = pathlib.Path(__file__).resolve().parents[1] / 'golden'
FOLDER = pathlib.Path(os.environ.get('UNI_MOE_FIXTURES') or _DEFAULT).expanduser()
_SPE_WORD = 'spe word (used when OLD_CHECKPONT False)'

WEIGHTS = ('state_dict', 'state_dict_overlay')
SECTIONS = ('forward', 'train_loss_and_grad', 'optimizer', 'misc', 'generation')  # that this suite compares


@functools.cache
def manifest() -> dict[str, Any]:
  return json.loads((FOLDER / 'manifest.json').read_text())


def entry(name: str) -> dict[str, Any]:
  """The manifest's entry of a file."""
  return manifest()['files'][name]


def excluded() -> dict[str, str]:
  """Cases that the suite leaves out, by name, each with the reason."""
  reason = 'no published config uses the memory bank'
  return {name: reason for name, e in manifest()['files'].items() if 'queue_len' in e}


def cases(*sections: str) -> list[str]:
  """Names of the compared cases of some sections."""
  return [name for name, e in manifest()['files'].items() if e['kind'] in sections and name not in excluded()]


class Arrays:
  """The arrays of one file; remembers which were read."""

  def __init__(self, name: str):
    self._arrays = dict(np.load(FOLDER / entry(name)['file']))
    declared = {k: (tuple(shape), dtype) for k, (shape, dtype) in entry(name)['arrays'].items()}
    actual = {k: (v.shape, str(v.dtype)) for k, v in self._arrays.items()}
    assert declared == actual, f'{name}: the arrays are not those of the manifest'
    self._read: set[str] = set()

  def __getitem__(self, key: str) -> np.ndarray:
    self._read.add(key)
    return self._arrays[key]

  def __contains__(self, key: str) -> bool:
    return key in self._arrays

  def get(self, key: str) -> np.ndarray | None:
    return self[key] if key in self else None

  def keys(self, prefix: str = '') -> list[str]:
    return [k for k in self._arrays if k.startswith(prefix)]

  @property
  def unread(self) -> set[str]:
    return set(self._arrays) - self._read


def model_of(weights_: str) -> str:
  """'dense' from 'weights_dense.npz'; of 'A + B', where B adds to A, the model of B."""
  return weights_.rpartition(' + ')[2].removeprefix('weights_').removesuffix('.npz')


def base_of(model: str) -> str | None:
  """The model to which a model's own file adds weights; None: it has all of them."""
  base = entry(f'weights_{model}').get('base')
  return None if base is None else model_of(base)


def sizes(model: str) -> dict[str, Any]:
  """A model's entry; one that adds to another has its sizes."""
  base = base_of(model)
  return {**(sizes(base) if base else {}), **manifest()['models'][model]}


# The published system counts layers from 1, so that its 'odd' layers are our 0, 2, 4, …
_PLACEMENTS = {'all': 'all', 'odd': 'every_2'}


def model_spec(model: str, prefix_is_word: bool = False, **changes: Any) -> ModelSpec:
  """The model of a manifest entry, on the path that training uses: scan, remat, readout rows."""
  m = sizes(model)
  moe, special, prompt = m['moe'], m['special_ids'], m['prompt']
  assert m['share_layernorm'] and m['layer_scale'] and m['output_proj'] and m['ln_eps'] == 1e-5, m
  spec = ModelSpec(num_layers=m['layers'], width=m['hidden'], num_heads=m['heads'], mlp_dim=m['ffn'],
                   vocab_size=m['vocab'], spe_id=special['<|spe|>'], image_size=m['image'], patch_size=m['patch'],
                   max_num_frames=m['max_frames'], max_text_len=m['text_pos_max_len'], posemb='frozen',
                   prefix_word=special[_SPE_WORD] if prefix_is_word or not m['OLD_CHECKPONT'] else None,
                   router='attribute' if moe else 'dense', num_experts=moe['experts'] if moe else 8,
                   top_k=moe['top_k'] if moe else 2, noise_std=0.0,
                   placement=_PLACEMENTS[moe['location']] if moe else 'none',
                   temperature_groups=PUBLISHED_TEMPERATURES)
  if prompt:
    spec = dataclasses.replace(
        spec, num_deep_prompts=prompt['length'], prompt_sharing='shared' if prompt['share'] else 'separate',
        spe_bias=True, head=prompt['fc_out'] if prompt['fc'] else 0)
  return dataclasses.replace(spec, **changes)


def end_of_text(model: str) -> int:
  return sizes(model)['special_ids']['<|endoftext|>']


@functools.cache
def weights(model: str) -> dict[str, np.ndarray]:
  """The published state dict of a model."""
  base = base_of(model)
  return {**(weights(base) if base else {}), **np.load(FOLDER / f'weights_{model}.npz')}


@functools.cache
def params(model: str) -> Any:
  """The same as our parameter tree."""
  return torch_layout.from_torch(weights(model), model_spec(model))[0]


def relative(ours, theirs) -> float:
  """‖ours - theirs‖ / ‖theirs‖; where theirs is exactly zero, the largest absolute difference."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  norm = np.linalg.norm(theirs)
  return float(np.linalg.norm(ours - theirs) / norm) if norm else float(np.abs(ours).max(initial=0.0))


def assert_close(ours, theirs, bound: float, what: str) -> None:
  error = relative(ours, theirs)
  assert error <= bound, f'{what}: relative error {error:.2e}, at most {bound:.0e}'
