"""What the subjects measure: configs of the benchmark's own, the config that was given, and steps that can be repeated."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from uni_moe_jax import config as config_lib
from uni_moe_jax.config import presets
from uni_moe_jax.config.plan import make_plan
from uni_moe_jax.tools.bench.settings import Sizes
from uni_moe_jax.tools.bench.synthetic import SyntheticData
from uni_moe_jax.train import run as train_run
from uni_moe_jax.train.forward import StepSpec, forward
from uni_moe_jax.train.run import Run


@dataclasses.dataclass(frozen=True)
class Context:
  """What every subject is given.

  Attributes:
    sizes: of the benchmark's own cases. config: the one that was named; `mixed`, `input` and `compile` take their tasks,
      data and model from it.
    dtype: of products. peak: FLOP/s of float32 products, measured in this run. devices: to run on.
  """
  sizes: Sizes
  config: ml_collections.ConfigDict
  dtype: str
  peak: float
  devices: Sequence[jax.Device]

  def own_config(self, **model: Any) -> ml_collections.ConfigDict:
    """A copy of the named config, with fields of config.model changed."""
    c = self.config.copy_and_resolve_references()
    if self.sizes.own_layers:
      c.model.num_layers = self.sizes.own_layers
    c.model.update({'dtype': self.dtype, **model})
    return c

  def tiny(self, router: str = 'attribute', **moe: Any) -> ml_collections.ConfigDict:
    """The benchmark's model, without tasks; `moe` are more fields of config.moe."""
    c = config_lib.base()
    c.model.update({**self.sizes.model, 'dtype': self.dtype, 'layer_scale_init': 0.1})
    c.moe.update(dict(router=router, num_experts=self.sizes.experts, **moe))
    return c

  def pictures_and_names(self, **moe: Any) -> ml_collections.ConfigDict:
    """Pictures against their own names: both sides in every step; `moe` as in `tiny`."""
    c = self.tiny(**moe)
    c.tasks.pair = config_lib.task('image_retrieval', 'synthetic', batch_size=self.sizes.batch_size, caption_templates=('name',),
                                   max_len=self.sizes.name_tokens)
    return c

  def classification(self, published: bool = False) -> ml_collections.ConfigDict:
    """Pictures against a set of names, attribute routing, with the published choices or with ours."""
    c = self.tiny()
    if published:
      presets.published(c)
    c.target_sets.names = config_lib.target_set('synthetic/names', family='names', max_len=self.sizes.name_tokens)
    c.tasks.classes = config_lib.task('image_classification', 'synthetic', batch_size=self.sizes.small_batch, target_set='names',
                                      label_column='class', label_smoothing=0.1)
    return c

  def captions(self, router: str) -> ml_collections.ConfigDict:
    """A caption model; its vocabulary is only sized here."""
    c = self.tiny(router)
    c.target_sets.vocabulary = config_lib.target_set('vocabulary', family='words')
    c.tasks.caption = config_lib.task('image_caption', 'synthetic', batch_size=self.sizes.small_batch, target_set='vocabulary',
                                      caption_templates=('name',), max_len=self.sizes.words)
    return c

  def synthetic(self, config: ml_collections.ConfigDict, lengths: Mapping[int, float] | None = None) -> Run:
    """A run on random data; `lengths` of names, by default all have `sizes.name_tokens`."""
    s = self.sizes
    data = SyntheticData(make_plan(config), (config.model.image_size, config.model.channels), s.vocabulary, s.names,
                         lengths or {s.name_tokens: 1.0})
    return train_run.build(config, self.devices, data)

  def build(self, config: ml_collections.ConfigDict) -> Run:
    """A run on the config's own data."""
    return train_run.build(config, self.devices)


class Repeated:
  """A training step on one batch over and over: the state goes from call to call, as it does in training."""

  def __init__(self, run: Run):
    self.run = run
    task, batch = next(run.mixture().iterate(0, 1))
    self.batch, self.sets, self.state = run.put_batch(batch), run.target_sets(), run.init()
    self._step = run.step_fn(task)
    self.metrics: dict[str, jax.Array] = {}

  def __call__(self) -> dict[str, jax.Array]:
    return self.step(self.batch)

  def step(self, batch) -> dict[str, jax.Array]:
    """One step on a batch that lies on the devices; the old state is donated."""
    self.state, self.metrics = self._step(self.state, batch, self.sets)
    return self.metrics

  def infer(self):
    """Features of the same batch and sets, without noise."""
    return features(self.run.spec, self.state.params, self.batch, self.sets)


@functools.partial(jax.jit, static_argnums=0)
def features(spec: StepSpec, params, batch, sets):
  """Features as `forward` returns them, at evaluation."""
  return forward(spec, params, batch, sets, {}, None)[0]
