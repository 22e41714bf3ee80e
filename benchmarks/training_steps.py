"""Training and inference steps: every router against dense, all tasks of the quickstart, and the published setting.

  python -m benchmarks.training_steps --output=steps.json

The sizes are those of tiny/16 on a CPU, and of base/16 in bfloat16 on one GPU, whose share of the peak is printed.
"""

import jax

from benchmarks import cases, paired
from benchmarks.cases import RepeatedStep
from uni_moe_jax.cli import boundary as cli
from uni_moe_jax.config.validate import TOKEN_ROUTER_FIELDS
from uni_moe_jax.model.flops import TRAIN
from uni_moe_jax.parallel import peaks
from uni_moe_jax.tasks.router_names import DENSE, DISPATCHED, ROUTERS
from uni_moe_jax.train import run as train_run
from uni_moe_jax.utils import heap

_CAPACITY = 'token, capacity 1.0'  # at inference routing is exact
# Share of names per length in tokens, `eot` included: an assumption about class names, two to three pieces each.
_REALISTIC = {2: 0.15, 3: 0.30, 4: 0.25, 5: 0.15, 6: 0.08, 7: 0.04, 8: 0.03}


def main() -> None:
  options = paired.arguments(__doc__)
  heap.keep_memory()  # as `uni-moe train` does, before threads start
  heap.share_arena()
  report, sizes = paired.Report(options), cases.sizes(options.quick)
  _routers(report, sizes)
  _published(report, sizes)
  _mixed(report, options.config, options.quick)
  report.write()


def _routers(report: paired.Report, sizes: cases.Sizes) -> None:
  """Each router in turns with dense: of the others one at a time is in memory."""
  def step(**moe) -> RepeatedStep:
    config = sizes.images_and_names(**moe)
    config.model.remat = False
    return RepeatedStep(sizes.run(config))

  dense = step(router=DENSE)
  work = dense.run.step_flops(None, dense.batch, dense.sets) / TRAIN
  rate = peaks.of_kind(jax.devices()[0].device_kind)
  for name, passes, call in (('train', TRAIN, dense), ('inference', 1, dense.infer)):
    report.compare(f'dense, {name}', {DENSE: call}, work=sizes.batch_size, unit='examples/s')
    flops = passes * work * report.lines[-1]['value'] / sizes.batch_size
    report.add(f'dense, {name}: matrix products', 100 * flops / rate if rate else flops / 1e9,
               '% of the peak' if rate else 'GFLOP/s')
  for router in [r for r in ROUTERS if r != DENSE] + [_CAPACITY]:
    other = step(router='token', capacity_factor=1.0) if router == _CAPACITY else step(router=router)
    report.compare('train step', {DENSE: dense, router: other})
    if router != _CAPACITY:
      report.compare('inference', {DENSE: dense.infer, router: other.infer})


def _published(report: paired.Report, sizes: cases.Sizes) -> None:
  """The published setting; the authors' code took 3.1 s at 8 images and 1,000 names (docs/results/performance.md)."""
  lengths = {'names of one length': {sizes.name_tokens: 1.0}, 'names of realistic length': _REALISTIC}
  report.compare('published setting, train step', {
      name: RepeatedStep(sizes.run(sizes.published_classification(), shares)) for name, shares in lengths.items()})


def _mixed(report: paired.Report, file: str, quick: bool) -> None:
  """All tasks of a config on its own data, by router."""
  def step(router: str) -> RepeatedStep:
    config = cli.config_from(file, ['train.mixture=all_tasks', *(['model.num_layers=2'] if quick else [])])
    config.moe.router = router
    if router not in DISPATCHED:
      config.moe.update(dict.fromkeys(TOKEN_ROUTER_FIELDS, 0))
    return RepeatedStep(train_run.build(config, jax.devices()[:1]))

  dense = step(DENSE)
  for router in ('attribute',) if quick else [r for r in ROUTERS if r != DENSE]:
    report.compare(f'{file}, train step', {DENSE: dense, router: step(router)})


if __name__ == '__main__':
  main()
