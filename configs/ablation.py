"""Router ablation: the embedded tasks with a model so narrow that the tasks compete for it.

  uni-moe prepare-data
  uni-moe sweep --sweep=routers --workdir=runs/routers     # dense and the five routers; or one of them:
  uni-moe train --config=ablation:router=dense --workdir=runs/dense

Arguments: router=attribute (default), task, modality, token, context or dense; split=test (default), or validation, for
choices that must not see the test examples; tasks=all (default), or some of them, such as package+text, to see what
these learn without the others. docs/guides/analysis.md says how the learning rate was chosen.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.tasks.router_names import ROUTERS
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_VALIDATION_NAMES = 268  # of characters that only validation has, and its videos show


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """3 layers, width 48, 8 experts; images of 32 pixels in patches of 8."""
  a = config.arguments(arg, __file__, dict(router='attribute', split='test', tasks='all'),
                       dict(router=ROUTERS, split=('test', 'validation')))
  c = config.base()
  presets.embedded(c)
  c.model.update(dict(num_layers=3, width=48, num_heads=2, mlp_dim=96, stem='conv'))
  c.moe.router = a.router
  c.target_sets.vocabulary.num_sampled = 512
  for name, batch_size in dict(glyph_class=32, glyph_name=48, glyph_question=12, video_motion=4, text=12,
                               package=12).items():
    c.tasks[name].batch_size = batch_size
  c.tasks.glyph_name.loss_weight, c.tasks.glyph_caption.loss_weight = 2.5, 2.0
  for name in ('glyph_class', 'glyph_name', 'glyph_caption'):
    c.tasks[name].max_shift = 2
  if a.split == 'validation':
    for name in [n for n in c.evaluators if n.endswith(presets.UNSEEN[1][1])]:
      del c.evaluators[name]
    for evaluator in c.evaluators.values():
      evaluator.split, evaluator.num_examples = a.split, min(evaluator.num_examples, _VALIDATION_NAMES)
  if a.tasks != 'all':
    _keep(c, a.tasks.split('+'))
  c.optim.update(dict(name='muon', learning_rate=8e-3, warmup_steps=60))
  c.train.update(dict(steps=800, log_every=20, checkpoint_every=200, keep_every=200))  # interference over training
  return c


def _keep(c: ml_collections.ConfigDict, tasks: list[str]) -> None:
  """Removes all other tasks, and what belongs to them."""
  if unknown := [name for name in tasks if name not in c.tasks]:
    raise UsageError(f'ablation: tasks={"+".join(tasks)}: {unknown[0]!r} is unknown; {nearest(unknown[0], c.tasks)}.')
  kept = {*tasks, *(c.tasks[name].target_set for name in tasks)}
  for name in [name for name, e in c.evaluators.items() if e.task not in tasks]:
    del c.evaluators[name]
  for section in (c.tasks, c.target_sets, c.preflight.target_lengths, c.preflight.num_frames):
    for name in [name for name in section if name not in kept]:
      del section[name]
