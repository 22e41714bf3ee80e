"""Runs a plan's evaluators and writes evaluation.json, evaluators.json and samples.json."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

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
  # Most of the time goes to compiling, which uses one core.
  num_threads = min(2, cores.available()) if sharding.on_one_cpu(predictor.mesh) and jax.process_count() == 1 else 1
  # A process whose part of the data cannot be read would leave the others waiting.
  with multihost.exit_with_peers():
    if fingerprints := data.evaluation_fingerprints() if plan.evaluations else {}:
      multihost.check_same_data(data.inputs_fingerprint, fingerprints)
    if writes:  # as it is: a folder without permission or space is an error before the evaluation, not at its end
      made_by = folder / EVALUATORS_FILE
      storage.write_bytes(made_by, made_by.read_bytes() if made_by.exists() else b'{}')
    measured = run(plan.evaluations, lambda e: scores(e, data, predictor, shown), num_threads)
  rows = [score.row(name, step) for name, score in measured]
  if writes:
    write(folder, rows, {e.name: shown[e.name] for e in plan.evaluations if e.name in shown},
          _made_by(plan, fingerprints, model))
  return rows


def run(
    evaluations: Sequence[Evaluation], measure: Callable[[Evaluation], list[Score]], num_threads: int
) -> list[tuple[str, Score]]:
  """Measures evaluators; returns (name of the evaluator, score) in order.

  Those of a task, which share programs, share a thread.
  """
  def measure_all(same_task: list[Evaluation]) -> list[tuple[str, Score]]:
    measured = []
    for e in same_task:
      start = time.perf_counter()
      measured += [(e.name, score) for score in measure(e)]
      print(f'{e.name}: {time.perf_counter() - start:.0f} s', flush=True)
    return measured

  by_task = [list(group) for _, group in itertools.groupby(evaluations, key=lambda e: e.task.name)]
  with baselines.bounded_fits():
    if num_threads == 1:
      return [*itertools.chain(*map(measure_all, by_task))]
    pool, waits = concurrent.futures.ThreadPoolExecutor(num_threads), True
    try:
      return [*itertools.chain(*pool.map(measure_all, by_task))]
    except KeyboardInterrupt:
      waits = False  # the evaluators that run may take minutes
      raise
    finally:
      pool.shutdown(waits, cancel_futures=True)


def write(folder: storage.Path, rows: list[dict], shown: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
  """Writes the files of an evaluation. shown: samples by evaluator. made_by: content of `EVALUATORS_FILE`."""
  # Empty while files change: rows are never taken for those of other evaluators, whenever this process is killed.
  write_json(folder / EVALUATORS_FILE, {})
  write_json(folder / samples.FILE, shown)
  write_json(folder / EVALUATION_FILE, rows)
  write_json(folder / EVALUATORS_FILE, made_by)


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


def _made_by(plan: Plan, fingerprints: Mapping[str, str | None], model: str) -> dict[str, dict[str, Any]]:
  """The fields of every evaluator, with digests of its data and of the model."""
  return {name: {**dataclasses.asdict(e), _DATA: fingerprints.get(name), _MODEL: model}
          for name, e in plan.config.evaluators.items()}


def finished_rows(
    workdir: str | os.PathLike[str], plan: Plan, step: int, config: ml_collections.ConfigDict | None = None,
    model: str = '') -> list[dict[str, Any]]:
  """The rows of evaluation.json if the evaluators of a plan made it, at a step; else [].

  Args:
    workdir, plan, step, model: as of `evaluate`.
    config: that names the data it must be about; None, or where that is missing: about any.
  """
  made_by = read_json(storage.path(workdir) / EVALUATORS_FILE)
  if made_by is None or step != evaluated_step(workdir):
    return []
  fingerprints = {name: fields.get(_DATA) for name, fields in made_by.items()}
  if config is not None and distributed.is_primary():  # which decides for all: their hosts may have other data
    with contextlib.suppress(MissingFileError):
      fingerprints = Sources(config, plan).evaluation_fingerprints()
  if not multihost.broadcast_from_primary(made_by == _made_by(plan, fingerprints, model)):
    return []
  return read_json(storage.path(workdir) / EVALUATION_FILE)


def evaluated_step(workdir: str | os.PathLike[str]) -> int | None:
  """The step of the evaluation in a work directory, or None."""
  rows = read_json(storage.path(workdir) / EVALUATION_FILE)
  return rows[0]['step'] if rows else None
