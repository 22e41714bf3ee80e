"""Runs a plan's evaluators and writes what they found: evaluation.json, samples.json."""

import json
import os
import pathlib
import time
from collections.abc import Callable

from uni_moe_jax.config.plan import Plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.eval import evaluators, glue_vqa
from uni_moe_jax.eval.evaluators import Question
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.eval.samples import Samples
from uni_moe_jax.utils.files import write_json

EVALUATION_FILE = 'evaluation.json'
EVALUATORS: dict[str, Callable[[Question], list[Score]]] = {
    'classification': evaluators.classification,
    'retrieval': evaluators.retrieval,
    'caption': evaluators.caption,
    'mlm': evaluators.masked_language_modelling,
    'glue': glue_vqa.glue,
    'vqa': glue_vqa.vqa,
}


def evaluate(
    plan: Plan, data: Data, predictor: Predictor, step: int, workdir: str | os.PathLike[str], writes: bool = True) -> list[dict]:
  """Runs every evaluator; returns the rows of evaluation.json and writes them (last, so that they stand for all files).

  Args:
    plan, data: of the run. predictor: of its parameters. step: at which it has them. workdir: its folder.
    writes: of several processes, which all take part, one does.
  """
  samples, rows = Samples(), []
  for e in plan.evaluations:
    start = time.perf_counter()
    texts = data.target_sets[e.task.target_set].names if e.task.target_set else ()
    examples = data.examples(e.task, e.split, num_views=e.num_views, num_crops=e.num_crops)
    question = Question(
        e, predictor, examples, data.records(e.task.source, e.split), data.records(e.task.source, e.task.split), texts,
        data.entry_keys.get(e.task.target_set, ()), data.tokenizer, samples)
    rows += [score.row(e.name, step) for score in EVALUATORS[e.type](question)]
    print(f'{e.name}: {time.perf_counter() - start:.0f} s', flush=True)
  if writes:
    samples.write(pathlib.Path(workdir) / 'samples.json')
    write_json(pathlib.Path(workdir) / EVALUATION_FILE, rows)
  return rows


def evaluated_step(workdir: str | os.PathLike[str]) -> int | None:
  """The step whose evaluation lies in a work directory, or None."""
  path = pathlib.Path(workdir) / EVALUATION_FILE
  if not path.exists():
    return None
  rows = json.loads(path.read_text())
  return rows[0]['step'] if rows else None
