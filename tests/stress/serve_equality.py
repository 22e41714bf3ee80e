"""Answers of the service and of the evaluator on test examples: classes, and captions token for token.

  python -m tests.stress.serve_equality --workdir=runs/quickstart --model=exported
"""

import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import flags

from tests.helpers import saved_run, served, shipped
from uni_moe_jax.data.pipeline.mixtures import evaluation_batches
from uni_moe_jax.export import contents
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.utils import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Trained run.', required=True)
_MODEL = flags.DEFINE_string('model', None, 'Its exported folder.', required=True)
_SPLIT = flags.DEFINE_string('split', 'test_characters', 'Of the examples.')
_NUM_EXAMPLES = flags.DEFINE_integer('num_examples', 200, 'Per task.', lower_bound=1)


def main() -> int:
  run, predictor, params = saved_run.load(workdir_lib.load_config(_WORKDIR.value), _WORKDIR.value)
  spec, wrong = contents.portable(run.spec.model.spec, 'float32'), 0
  with served.running(model=pathlib.Path(_MODEL.value).absolute(), XLA_FLAGS='') as service:
    for task in run.plan.tasks:
      if task.type.readout != 'queries' and not (task.type.visual and task.type.readout == 'cls' and task.target_set):
        continue
      examples = run.data.examples(task, _SPLIT.value)
      ids = np.arange(min(_NUM_EXAMPLES.value, examples.size))
      [(fields, _)] = evaluation_batches(examples, ids, len(ids))
      pixels = fields['pixels']
      if task.type.readout == 'queries':
        words = predictor.target_set(task.target_set)
        expected = shipped.search(spec, params, task, run.data.tokenizer, pixels, words).tokens[:, 0].tolist()
        send = lambda image: service.post('/caption', task=task.name, image=image)['tokens']  # noqa: B023
      else:
        log_p = np.asarray(predictor.log_probabilities(predictor.inputs(task.type, fields), task))[:, 0]
        names = run.data.target_sets[task.target_set].names
        expected = [names[i] for i in log_p.argmax(-1)]
        send = lambda image: service.post('/classify', task=task.name, image=image)['answers'][0]['text']  # noqa: B023
      with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(send, [served.png(p[0, ..., 0] if p.shape[-1] == 1 else p[0]) for p in pixels]))
      different = sum(a != b for a, b in zip(answers, expected, strict=True))
      wrong += different
      print(f'{task.name}: {len(answers)} answers, {len(set(map(str, answers)))} distinct, {different} differ from the '
            "evaluator's", flush=True)
  return int(bool(wrong))


if __name__ == '__main__':
  cli.run(main)
