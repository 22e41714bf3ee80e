"""Scores of a model whose experts are merged permanently, as it is exported: they are those of the trained model."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from uni_moe_jax.config.plan import Plan
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.eval import suite
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.export.merge import merged
from uni_moe_jax.io import files, storage
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.tasks.attributes import Condition
from uni_moe_jax.utils.errors import UsageError

FOLDER = 'merged'  # in a work directory: the evaluation of the merged model


def evaluate(
    spec: ModelSpec, params: Any, conditions: tuple[Condition, ...], data: Data, plan: Plan,
    workdir: str | os.PathLike[str]) -> str:
  """Merges an evaluated model for all its conditions, runs every evaluator on one device and compares the scores.

  Writes the files of an evaluation to `FOLDER`.

  Returns:
    A sentence about the largest difference.

  Raises:
    UsageError: the router is by token, there are no evaluators, or they were others.
  """
  if not plan.evaluations:
    raise UsageError('there are no scores to compare: config.evaluators is empty; add an evaluator.')
  folder, rows = storage.path(workdir), files.read_json(storage.path(workdir) / suite.EVALUATION_FILE)
  spec, params = merged(spec, params, conditions)
  predictor = Predictor.of(UniPerceiver(spec), params, plan, data)
  storage.make_folder(folder / FOLDER)
  difference, metric = largest_difference(
      suite.evaluate(plan, data, predictor, rows[0]['step'], folder / FOLDER), rows)
  return f'merged: the largest difference of a score is {difference:.1g}, in {metric}'


def largest_difference(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
  """The largest |a - b| / max(1, |b|) of two evaluations' metrics, and where it is; inf if one alone is not finite.

  Raises:
    UsageError: they have different metrics.
  """
  one, other = ({f'{r["evaluator"]}, {r["metric"]}': r['value'] for r in x} for x in (rows, others))
  if one.keys() != other.keys():
    raise UsageError('the two evaluations have different metrics; evaluate the run again with --force.')

  def difference(a: float, b: float) -> float:
    if a == b or math.isnan(a) and math.isnan(b):
      return 0.
    return abs(a - b) / max(1, abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf

  return max(((difference(one[key], b), key) for key, b in other.items()), default=(0., ''))
