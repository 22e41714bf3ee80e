"""Your own data: train a model from scratch, or adapt a trained run.

  uni-moe prepare-data --input=photos --name=pets
  uni-moe train --config=own:sources=pets --workdir=runs/pets
  uni-moe evaluate --workdir=runs/pets

Arguments:
  sources=pets+reviews     names of prepared data, joined by '+'. For data outside of the default
                           directory, give folders: /data/own/pets+/data/own/reviews, gs://b/data/own/pets
  run=RUN                  work directory of the run to adapt; without it, a small model trains from scratch
  mode=finetune            every parameter of the run trains (default)
  mode=prompts             only prompts and norms train
  mode=zero_shot           nothing trains; for uni-moe evaluate
  devices=1                devices that share each batch; batches are larger by this factor

Tasks follow from the columns of the data: captions give retrieval and captioning; classes, classification; texts,
masked language modeling or classification. Change them by overrides such as
--config.tasks.pets_retrieval.batch_size=32, or in a config file of your own that calls `presets.own`. The scores depend
on the data; evaluation reports chance beside them.
"""

import ml_collections

from uni_moe_jax import config
from uni_moe_jax.config import presets
from uni_moe_jax.data.shards import file_dataset
from uni_moe_jax.io import storage
from uni_moe_jax.train import adaptation
from uni_moe_jax.utils.errors import MissingFileError, UsageError


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """2 layers, width 128, 8 experts, images of 64 pixels in patches of 16; or the model of the run."""
  a = config.arguments(
      arg, __file__, dict(sources='', run='', mode='finetune', devices=1), dict(mode=adaptation.MODES),
      required=('sources',))
  if not a.devices:
    raise UsageError(f'own:{arg}: devices=0 must be at least 1, the number of devices that share each batch.')
  paths = [storage.path(name, f'own:{arg}') for name in a.sources.split('+')]
  directories = {str(p.parent.parent) if p.parent.name else config.base().data.dir for p in paths}
  if len(directories) > 1:
    raise UsageError(f'own:{arg}: the sources are in several data directories '
                     f'({", ".join(sorted(directories))}); a run reads one.')
  [directory] = directories
  summaries = {}
  for p in paths:
    try:
      summaries[p.name] = file_dataset.read_summary(file_dataset.own_folder(p.name, directory))
    except MissingFileError as e:
      if p.parent.name:
        raise
      # config.data.dir is set later
      raise MissingFileError(f'{e}; or name it in another data directory: sources=DIRECTORY/own/{p.name}.') from e
  if a.run:
    c, plan = adaptation.start_from(a.run, f'own:{arg}')
  else:
    c = config.base()
    presets.small(c)
    c.tokenizer.allow_smaller_vocab = True  # the amount of text is unknown
    c.model.frame_differences = any('video' in summary['columns'].values() for summary in summaries.values())
  c.data.dir = directory
  presets.own(c, summaries, a.devices)
  for name, summary in summaries.items():
    if not any(t.source == f'own:{name}' for t in c.tasks.values()):
      columns = ', '.join(f'{column} ({column_type})' for column, column_type in summary['columns'].items())
      raise UsageError(
          f'own:{arg}: the columns of {name} give no task: {columns}. Images and videos need captions (field '
          "'caption' or 'captions') or a field with at least two classes; texts need a field 'text' or such a class "
          'field. Rename the fields, and prepare the data again.')
  if a.run:
    adaptation.share_temperatures(c, plan)
    adaptation.MODES[a.mode](c)
  return c
