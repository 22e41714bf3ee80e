"""Runs a plan's evaluators and writes evaluation.json, evaluators.json, samples.json and the scores of examples."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from uni_moe_jax.config.plan import Evaluation, Plan
from uni_moe_jax.data.batches.assemble import Data, Sources
from uni_moe_jax.data.examples.examples import Examples
from uni_moe_jax.eval import baselines, evaluators, glue_vqa, samples
from uni_moe_jax.eval.evaluators import Query
from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import read_json, write_json
from uni_moe_jax.parallel import distributed, multihost, sharding
from uni_moe_jax.utils import cores
from uni_moe_jax.utils.errors import MissingFileError

EVALUATION_FILE = 'evaluation.json'
EVALUATORS_FILE = 'evaluators.json'  # those that made it
EXAMPLES_FILE = 'evaluation_examples.npz'  # scores of single examples, so that runs can be compared by them
_DATA, _MODEL = 'data_fingerprint', 'model_fingerprint'  # fields of these, beside those of the config
EVALUATORS: dict[str, Callable[[Query], list[Score]]] = {
    'classification': evaluators.classification,
    'retrieval': evaluators.retrieval,
    'caption': evaluators.caption,
    'mlm': evaluators.masked_language_modeling,
    'glue': glue_vqa.glue,
    'vqa': glue_vqa.vqa,
}


def evaluate(
    plan: Plan, data: Data, predictor: Predictor, step: int, workdir: str | os.PathLike[str],
    writes: bool = True, model: str = '') -> list[dict]:
  """Runs every evaluator; returns the rows of evaluation.json and writes that file, then which evaluators made it.

  Args:
    plan, data, predictor, workdir: of the run.
    step: of the predictor's parameters.
    writes: True in the one process that writes; all processes take part.
    model: digest of the checkpoint that has the parameters.
  """
  folder, shown = storage.path(workdir), {}
  measure = functools.partial(_measure, data=data, predictor=predictor, shown=shown)
  by_task = [list(group) for _, group in itertools.groupby(plan.evaluations, key=lambda e: e.task.name)]
  # A process whose part of the data cannot be read would leave the others waiting.
  with multihost.exit_with_peers(), baselines.bounded_fits():
    if fingerprints := data.evaluation_fingerprints() if plan.evaluations else {}:
      multihost.check_same_data(data.inputs_fingerprint, fingerprints)
    if writes:  # as it is: a folder without permission or space is an error before the evaluation, not at its end
      made_by = folder / EVALUATORS_FILE
      storage.write_bytes(made_by, made_by.read_bytes() if made_by.exists() else b'{}')
    if sharding.on_one_cpu(predictor.mesh) and jax.process_count() == 1:
      # Most of the time goes to compiling, which uses one core.
      pool, waits = concurrent.futures.ThreadPoolExecutor(min(2, cores.available())), True
      try:
        done = list(pool.map(measure, by_task))
      except KeyboardInterrupt:
        waits = False  # the evaluators that run may take minutes
        raise
      finally:
        pool.shutdown(waits, cancel_futures=True)
    else:
      done = map(measure, by_task)
    measured = list(itertools.chain(*done))
  rows = [score.row(name, step) for name, score in measured]
  if writes:
    # Empty while files change: rows are never taken for those of other evaluators, whenever this process is killed.
    write_json(folder / EVALUATORS_FILE, {})
    _write_example_scores(folder, measured)
    in_order = {e.name: shown[e.name] for e in plan.evaluations if e.name in shown}
    write_json(folder / samples.FILE, in_order)
    write_json(folder / EVALUATION_FILE, rows)
    write_json(folder / EVALUATORS_FILE, {
        name: {**fields, _DATA: fingerprints.get(name), _MODEL: model} for name, fields in _settings(plan).items()})
  return rows


def _write_example_scores(folder: storage.Path, scores: Iterable[tuple[str, Score]]) -> None:
  """Writes {'EVALUATOR/METRIC': values and weights, float32 [2, N]} of every metric that is a mean over examples.

  The value in evaluation.json is the weighted mean; that of perplexity is exp of minus the mean. Examples have the same
  order in all runs on the same data: it depends on the data and on the evaluator's name alone.
  """
  arrays = {}
  for evaluator, score in scores:
    if (values := score.per_example) is not None:
      weights = np.ones(len(values)) if score.weights is None else score.weights
      arrays[f'{evaluator}/{score.name}'] = np.stack([values, weights]).astype(np.float32)
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  storage.write_bytes(folder / EXAMPLES_FILE, content.getvalue())


def _measure(
    evaluations: Iterable[Evaluation], data: Data, predictor: Predictor, shown: dict[str, list[dict[str, Any]]],
) -> list[tuple[str, Score]]:
  """The scores of evaluators that share programs, each with its evaluator's name."""
  measured = []
  for e in evaluations:
    start = time.perf_counter()
    measured += [(e.name, score) for score in scores(e, data, predictor, shown)]
    print(f'{e.name}: {time.perf_counter() - start:.0f} s', flush=True)
  return measured


def scores(
    e: Evaluation, data: Data, predictor: Predictor, shown: dict[str, list[dict[str, Any]]],
    before_batch: Callable[[], None] = lambda: None) -> list[Score]:
  """The scores of one evaluator; all processes take part. shown: gets its samples. before_batch: see `Query`."""
  names = data.target_sets[e.task.target_set].names if e.task.target_set else ()
  return EVALUATORS[e.type](Query(
      e, predictor, examples(e, data), data.records(e.task.source, e.split),
      data.records(e.task.source, e.task.split), names, data.entry_keys.get(e.task.target_set, ()), data.tokenizer,
      shown, data.dir, before_batch))


def examples(e: Evaluation, data: Data) -> Examples:
  """The examples of one evaluator."""
  return data.examples(e.task, e.split, num_views=e.num_views, num_crops=e.num_crops)


def _settings(plan: Plan) -> dict[str, dict[str, Any]]:
  """The fields of every evaluator, as `EVALUATORS_FILE` has them beside the digest of its data."""
  return {name: dataclasses.asdict(e) for name, e in plan.config.evaluators.items()}


def finished_rows(
    workdir: str | os.PathLike[str], plan: Plan, step: int, config: ml_collections.ConfigDict | None = None,
    model: str = '') -> list[dict[str, Any]]:
  """The rows of evaluation.json if the evaluators of a plan made it, at a step; else [].

  Args:
    workdir, plan, step, model: as of `evaluate`.
    config: that names the data it must be about; None, or where that is missing: about any.
  """
  made_by = read_json(storage.path(workdir) / EVALUATORS_FILE)  # None: of a version that did not write it
  if made_by is None or step != evaluated_step(workdir):
    return []
  fingerprints = {name: fields.pop(_DATA, None) for name, fields in made_by.items()}
  models = {fields.pop(_MODEL, None) for fields in made_by.values()}
  if made_by != _settings(plan):
    return []
  # Evaluations of an earlier version have no digest, which only matters where the step is that of another run.
  known = {model, None} if plan.tasks else {model}
  # One process decides for all: their hosts may have other data.
  is_other = distributed.is_primary() and (not models <= known or _has_other_data(plan, config, fingerprints))
  if multihost.broadcast_from_primary(is_other):
    return []
  return read_json(storage.path(workdir) / EVALUATION_FILE)


def _has_other_data(plan: Plan, config: ml_collections.ConfigDict | None, fingerprints: Mapping[str, str]) -> bool:
  with contextlib.suppress(MissingFileError):
    return config is not None and fingerprints != Sources(config, plan).evaluation_fingerprints()
  return False


def evaluated_step(workdir: str | os.PathLike[str]) -> int | None:
  """The step of the evaluation in a work directory, or None."""
  rows = read_json(storage.path(workdir) / EVALUATION_FILE)
  return rows[0]['step'] if rows else None
