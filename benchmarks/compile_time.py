"""Seconds to trace, lower and compile the step of all tasks of the quickstart, at two depths, without any cache.

  python -m benchmarks.compile_time --output=compile.json
"""

import time

import jax

from benchmarks import paired
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.train import run as train_run


def main() -> None:
  options = paired.arguments(__doc__)
  jax.config.update('jax_enable_compilation_cache', False)
  report, depths = paired.Report(options), (2, 4) if options.quick else (12, 24)
  _seconds(options.config, depths[0])  # the first compile of a process is slower
  measured = {}
  for layers in (*depths, *reversed(depths)):  # a process that has compiled much is slower
    measured.setdefault(layers, []).append(_seconds(options.config, layers))
  for layers in depths:
    report.add(f'compile, {layers} layers', min(measured[layers]), 's',
               ratio=min(measured[layers]) / min(measured[depths[0]]))
  report.write()


def _seconds(file: str, layers: int) -> float:
  config = cli.config_from(file, ['train.mixture=all_tasks', f'model.num_layers={layers}'])
  run = train_run.build(config, jax.devices()[:1])
  _, batch = next(run.mixture().iterate(0, 1))
  batch, sets = run.put_batch(batch), run.target_sets()
  jax.clear_caches()
  start = time.perf_counter()
  run.step_fn().lower(run.abstract_state(), batch, sets).compile()
  return time.perf_counter() - start


if __name__ == '__main__':
  main()
