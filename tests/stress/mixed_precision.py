"""Trains twelve layers on handwritten digits in float32 and in bfloat16, at the published LayerScale of 1e-3.

  python -m tests.stress.mixed_precision
  python -m tests.stress.mixed_precision --width=384 --batch_size=64 --seeds=3

Prints, per type, the mean loss of the last 20 of 200 steps, that loss beyond its lower bound (label smoothing), the
seconds of a step and the temporaries of the program; then how far the loss of bfloat16 is from that of float32. A third
row trains in float32 from parameters that differ by what bfloat16 rounds: so far apart are runs whose arithmetic is the
same. Time and memory of a CPU say nothing about accelerators; see `launch/preflight.py`.

Exit codes: 0 the loss of bfloat16 is at most --bound above that of float32, 1 it is not, 2 usage. Lower is no failure:
rounding of any type moves this loss by about as much, in either direction.
"""

import dataclasses
import math
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from uni_moe_jax import config
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.schema import DataConfig
from uni_moe_jax.data.embedded import build
from uni_moe_jax.train import adaptation
from uni_moe_jax.train import run as train_run

STEPS, LAST = 200, 20
LAYER_SCALE = 1e-3
SMOOTHING, CLASSES = 0.1, 10
ROUNDING = 2.0**-9  # largest relative error of a bfloat16


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a run showed."""
  loss: float  # mean of the last steps
  seconds: float  # median of a step
  temporaries: int  # bytes of the compiled step


def lower_bound() -> float:
  """The least cross-entropy against smoothed labels: their entropy, in nats."""
  other = SMOOTHING / CLASSES
  label = 1 - SMOOTHING + other
  return -label * math.log(label) - (CLASSES - 1) * other * math.log(other)


def digits(data_dir: str, dtype: str, width: int, batch_size: int, seed: int) -> ml_collections.ConfigDict:
  """The config of a run."""
  c = config.base()
  adaptation.digits(c)
  c.data.dir = data_dir
  c.tasks.digits.update(dict(batch_size=batch_size, label_smoothing=SMOOTHING))
  c.tokenizer.update(dict(vocab_size=60, allow_smaller_vocab=True))
  c.model.update(dict(
      num_layers=12, width=width, num_heads=width // 64, mlp_dim=4 * width, image_size=32, patch_size=8,
      max_text_len=16, layer_scale_init=LAYER_SCALE, dtype=dtype, remat=False))
  c.moe.router = 'dense'
  c.optim.update(dict(learning_rate=2e-3, warmup_steps=20))
  c.train.steps = STEPS
  c.seed = seed
  return c


def train(c: ml_collections.ConfigDict, perturbation: float = 0.0) -> Trained:
  """Trains a run; its initial parameters are multiplied by 1 ± up to `perturbation`."""
  run = train_run.build(c, jax.devices()[:1])
  step, state, sets = run.step_fn(), run.init(), run.target_sets()
  noise = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x * jnp.float32(1 + perturbation * noise.uniform(-1, 1, x.shape)), state.params)
  state = run.state_from(params) if perturbation else state
  temporaries, losses, seconds = None, [], []
  for _, batch in run.mixture().iterate(0, c.train.steps):
    batch = run.put_batch(batch)
    if temporaries is None:
      temporaries = step.lower(state, batch, sets).compile().memory_analysis().temp_size_in_bytes
    started = time.perf_counter()
    state, metrics = step(state, batch, sets)
    losses.append(float(metrics['loss/total']))
    seconds.append(time.perf_counter() - started)
  return Trained(float(np.mean(losses[-LAST:])), float(np.median(seconds[LAST:])), temporaries)


def main(width: int, batch_size: int, seeds: int, bound: float) -> int:
  """Prints the table; returns the exit code."""
  variants = {'float32': ('float32', 0.0), 'bfloat16': ('bfloat16', 0.0), 'float32, perturbed': ('float32', ROUNDING)}
  means = {}
  least = lower_bound()
  print(f'| 12 layers of width {width}, batch {batch_size} | loss | beyond {least:.3f} | s a step | temporaries |')
  print('| --- | --- | --- | --- | --- |')
  with tempfile.TemporaryDirectory() as data_dir:
    build.build(DataConfig(dir=data_dir), 1, ['digits'])
    for name, (dtype, perturbation) in variants.items():
      runs = [train(digits(data_dir, dtype, width, batch_size, seed), perturbation) for seed in range(seeds)]
      loss, seconds, temporaries = np.mean([dataclasses.astuple(r) for r in runs], axis=0)
      means[name] = loss
      print(f'| {name} | {loss:.4f} | {loss - least:.4f} | {seconds:.2f} | {temporaries / 2**20:.0f} MiB |',
            flush=True)
  excess = {name: means[name] / means['float32'] - 1 for name in variants}
  within = excess['bfloat16'] <= bound
  print(f'the loss of bfloat16 is {excess["bfloat16"]:+.2%} from float32, {"not" if within else "MORE than"} '
        f'{bound:.0%} above it; that of perturbed float32 is {excess["float32, perturbed"]:+.2%} from it')
  return 0 if within else 1


def _main():
  width = flags.DEFINE_integer('width', 192, 'Width of the model, a multiple of 64.', 64)
  batch_size = flags.DEFINE_integer('batch_size', 32, 'Images of a step.', 1)
  seeds = flags.DEFINE_integer('seeds', 1, 'Runs of each row, whose losses are averaged.', 1)
  bound = flags.DEFINE_float('bound', 0.02, 'Largest loss of bfloat16 above that of float32, relative.', 0.)
  return lambda: main(width.value, batch_size.value, seeds.value, bound.value)


if __name__ == '__main__':
  cli.run(_main())
