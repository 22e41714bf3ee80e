"""Cases of the benchmarks: sizes, configs on random data, and repeated training steps."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import tensorflow as tf

from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import Plan, TaskSpec, make_plan
from uni_moe_jax.data.batches.target_sets import TargetSet, bucket_by_length, vocabulary_set
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.forward import forward
from uni_moe_jax.train.run import Run

_EXAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a benchmark: tiny/16 on a CPU; see also `BASE`."""
  num_layers: int = 12
  width: int = 192
  num_heads: int = 3
  mlp_dim: int = 768
  image_size: int = 224
  patch_size: int = 16
  experts: int = 8
  batch_size: int = 16
  names: int = 1000  # entries of the target set
  name_tokens: int = 8  # of the longest name
  vocabulary: int = 4096  # word ids of captions
  words: int = 20  # length of captions
  dtype: str = 'float32'

  def config(self, router: str = 'attribute', **moe: Any) -> ml_collections.ConfigDict:
    """A config without tasks; `moe`: more fields of config.moe."""
    c = config_lib.base()
    for name in ('num_layers', 'width', 'num_heads', 'mlp_dim', 'image_size', 'patch_size', 'dtype'):
      c.model[name] = getattr(self, name)
    c.model.layer_scale_init = 0.1
    c.moe.update(dict(router=router, num_experts=self.experts, **moe))
    return c

  def images_and_names(self, **moe: Any) -> ml_collections.ConfigDict:
    """Images against their own names: every step encodes both sides. `moe`: see `config`."""
    c = self.config(**moe)
    c.tasks.pair = config_lib.task(
        'image_retrieval', 'synthetic', batch_size=self.batch_size, caption_templates=('name',),
        max_len=self.name_tokens)
    return c

  def published_classification(self) -> ml_collections.ConfigDict:
    """Images against a set of names, attribute routing and the published choices."""
    c = self.config()
    presets.published(c)
    c.target_sets.names = config_lib.target_set('synthetic/names', family='names', max_len=self.name_tokens)
    c.tasks.classes = config_lib.task(
        'image_classification', 'synthetic', batch_size=self.batch_size, target_set='names',
        label_column='class', label_smoothing=0.1)
    return c

  def captions(self, router: str) -> ml_collections.ConfigDict:
    """A caption model; its vocabulary has a size but no words."""
    c = self.config(router)
    c.target_sets.vocabulary = config_lib.target_set('vocabulary', family='words')
    c.tasks.caption = config_lib.task(
        'image_caption', 'synthetic', batch_size=self.batch_size, target_set='vocabulary',
        caption_templates=('name',), max_len=self.words)
    return c

  def run(self, config: ml_collections.ConfigDict, lengths: Mapping[int, float] | None = None) -> Run:
    """A run on random data on the first device; lengths: of names, with shares; default: all `name_tokens`."""
    pixels = config.model.image_size, config.model.channels
    data = SyntheticData(
        make_plan(config), pixels, self.vocabulary, self.names, lengths or {self.name_tokens: 1.0})
    return train_run.build(config, jax.devices()[:1], data)


TINY = Sizes()
BASE = Sizes(width=768, num_heads=12, mlp_dim=3072, batch_size=128, dtype='bfloat16')  # for one GPU
QUICK = Sizes(num_layers=2, image_size=96, batch_size=4, names=200, vocabulary=1024, words=6)


def sizes(quick: bool) -> Sizes:
  """Sizes for the first device."""
  return QUICK if quick else TINY if jax.default_backend() == 'cpu' else BASE


class SyntheticData:
  """Random images, and texts of given lengths, instead of `data.assemble.Data`: images with a class or a text."""
  fingerprint, tokenizer_file = 'synthetic', None

  def __init__(self, plan: Plan, sizes: tuple[int, int], vocabulary: int, entries: int, lengths: Mapping[int, float]):
    """sizes: pixels per side, channels. vocabulary: V. entries: of every other set. lengths: their shares."""
    self._pixels = sizes
    self.tokenizer = types.SimpleNamespace(size=vocabulary, pad=0, spe=1, eot=2, first=3)  # first: of the words
    self.target_sets = {s.name: vocabulary_set(vocabulary) if s.is_vocabulary else self._names(entries, lengths)
                        for s in plan.sets}

  def _names(self, entries: int, lengths: Mapping[int, float]) -> TargetSet:
    rng = np.random.default_rng(0)
    rows = [[[*rng.integers(self.tokenizer.first, self.tokenizer.size, n - 1).tolist(), self.tokenizer.eot]]
            for n in rng.permutation(spread_lengths(entries, lengths))]
    buckets, order = bucket_by_length(rows, self.tokenizer.pad)
    return TargetSet(buckets, order, ('',) * entries)

  def examples(self, task: TaskSpec, split: str | None = None, training: bool = False) -> Examples:
    """Return random examples; every text has all of the task's tokens."""
    rng, (side, channels) = np.random.default_rng(1), self._pixels
    pixels = tf.constant(rng.integers(0, 256, (_EXAMPLES, 1, side, side, channels), dtype=np.uint8))
    texts = rng.integers(self.tokenizer.first, self.tokenizer.size, (_EXAMPLES, max(1, task.max_len)))
    texts[:, -1] = self.tokenizer.eot
    texts = tf.constant(texts.astype(np.int32))

    def make(ids, hashes):
      fields = {'id': ids, 'pixels': tf.gather(pixels, ids), 'weight': tf.ones([tf.size(ids), 1])}
      if task.type.target == 'pair':
        target = tf.gather(texts, ids)
        return {**fields, 'target': target, 'target_valid': tf.ones_like(target, tf.bool),
                'text_id': tf.cast(ids, tf.int32)}
      return {**fields, 'label': tf.cast(ids % self.target_sets[task.target_set].size, tf.int32)[:, None]}

    return Examples(_EXAMPLES, make)


def spread_lengths(entries: int, lengths: Mapping[int, float]) -> np.ndarray:
  """Return int [entries], ascending: each length in its share, by rounding cumulative shares."""
  edges = np.round(np.cumsum(list(lengths.values())) / sum(lengths.values()) * entries).astype(int)
  return np.repeat(list(lengths), np.diff(edges, prepend=0))


class RepeatedStep:
  """A training step, by default on a constant batch; each call continues from the state of the last."""

  def __init__(self, run: Run):
    self.run = run
    task, batch = next(run.mixture().iterate(0, 1))
    self.batch, self.sets, self.state = run.put_batch(batch), run.target_sets(), run.init()
    self._step = run.step_fn(task)
    self.metrics: dict[str, jax.Array] = {}

  def __call__(self, batch=None) -> dict[str, jax.Array]:
    """Take a step on a batch on the devices, and return its metrics; the old state is donated."""
    self.state, self.metrics = self._step(self.state, self.batch if batch is None else batch, self.sets)
    return self.metrics

  def infer(self):
    """Return features of the batch and sets, without noise."""
    return _features(self.run.spec, self.state.params, self.batch, self.sets)


_features = jax.jit(lambda spec, *arrays: forward(spec, *arrays, {}, None)[0], static_argnums=0)
