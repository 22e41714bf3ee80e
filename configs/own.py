"""Your own data: trained from scratch, or a trained run adapted to it.

  python launch/prepare_data.py --input=photos --name=pets
  python launch/train.py --config=configs/own.py:pets --workdir=runs/pets
  python launch/evaluate.py --workdir=runs/pets

Several sources are joined by '+', of whatever kinds: pets+reviews+clips. A trained run goes behind a comma, and what becomes of it:

  --config=configs/own.py:pets,runs/quickstart             every parameter goes on (finetune, the default)
  --config=configs/own.py:pets,runs/quickstart,prompts     prompts and norms alone
  --config=configs/own.py:pets,runs/quickstart,untuned     nothing trains; for launch/evaluate.py

Tasks follow from what the data has: captions give retrieval and captioning; classes, classification; texts, masked words or
classification. Print them with launch/train.py; change them by --config.tasks.pets_retrieval.batch_size=32, or in a config of your own
(recipes.own). Of a data directory other than the default, give the folders: /data/own/pets+/data/own/reviews. What it should score
depends on the data: every row of the evaluation stands beside chance.
"""

import pathlib

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.data.files import file_dataset
from uni_moe_jax.train import finetuning
from uni_moe_jax.utils.errors import UsageError


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Own: 4 layers, width 128, 8 experts, pictures of 64 pixels in patches of 8; or the model of the run."""
  names, _, rest = arg.partition(',')
  run, _, mode = rest.partition(',')
  if not names or mode not in finetuning.MODES:
    raise UsageError(f'configs/own.py:{arg}: give SOURCE[+SOURCE…][,RUN[,finetune|prompts|untuned]]: names of data that '
                     'launch/prepare_data.py prepared, and the workdir of a trained run.')
  paths = [pathlib.Path(name) for name in names.split('+')]
  directories = {str(p.parent.parent) if p.parent.name else config.base().data.dir for p in paths}
  if len(directories) > 1:
    raise UsageError(f'configs/own.py:{arg}: the sources lie in several data directories ({", ".join(sorted(directories))}); a run '
                     'reads one.')
  [directory] = directories
  facts = {p.name: file_dataset.read_summary(p.name, directory) for p in paths}
  if run:
    c, plan = finetuning.start_from(run, f'configs/own.py:{arg}')
  else:
    c, plan = config.base(), None
    presets.small(c)
    c.tokenizer.allow_smaller_vocab = True  # how much text there is only its owner knows
  c.data.dir = directory
  for name, found in facts.items():
    presets.own(c, name, found['columns'], {k: v['names'] for k, v in found['classes'].items()}, found['splits'])
  if run:
    finetuning.share_temperatures(c, plan)
    finetuning.MODES[mode](c)
  return c
