"""Runs a plan's evaluators and writes what they found: evaluation.json, samples.json, experts.json."""

import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from uni_moe_jax.attributes import Condition
from uni_moe_jax.plan import Plan
from uni_moe_jax.data.assemble import Data
from uni_moe_jax.eval.evaluators import EVALUATORS, Question
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.eval.samples import Samples
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.moe import routers

EVALUATION_FILE = 'evaluation.json'


def evaluate(plan: Plan, data: Data, predictor: Predictor, step: int, workdir: str | os.PathLike[str]) -> list[dict]:
  """Runs every evaluator; returns the rows of evaluation.json and writes them (last, so that they stand for all files)."""
  samples, rows = Samples(), []
  for e in plan.evaluations:
    start = time.perf_counter()
    texts = data.sets[e.task.target_set].texts if e.task.target_set else ()
    question = Question(
        e, predictor, data.examples(e.task, e.split), data.records(e.task.source, e.split),
        data.records(e.task.source, 'train'), texts, data.tokenizer, samples)
    rows += [score.row(e.name, step) for score in EVALUATORS[e.kind](question)]
    print(f'{e.name}: {time.perf_counter() - start:.0f} s', flush=True)
  samples.write(pathlib.Path(workdir) / 'samples.json')
  path = pathlib.Path(workdir) / EVALUATION_FILE
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(rows, indent=1))
  temporary.rename(path)
  return rows


def evaluated_step(workdir: str | os.PathLike[str]) -> int | None:
  """The step whose evaluation lies in a work directory, or None."""
  path = pathlib.Path(workdir) / EVALUATION_FILE
  if not path.exists():
    return None
  rows = json.loads(path.read_text())
  return rows[0]['step'] if rows else None


def write_experts(spec: ModelSpec, params: Any, conditions: tuple[Condition, ...], workdir: str | os.PathLike[str]) -> None:
  """experts.json: the coefficients of every layer's routers for every condition row, without noise. A router that
  looks at tokens has none; the file is not written, and a line says so."""
  if routers.looks_at_tokens(spec.router):
    print(f'experts.json is not written: the {spec.router} router decides by token, not by condition row.', flush=True)
    return
  stack, layers, table = spec.stack, [], []
  rows = routers.distinct_rows(spec.router, conditions)
  for layer, parts in enumerate(spec.pattern):
    if not parts:
      continue
    subtree, period, block = stack.locate(layer)
    tree = params['encoder'][subtree][block]
    if period is not None:
      tree = jax.tree.map(lambda x, p=period: x[p], tree)
    layers.append(layer)
    table.append([np.asarray(_decide(spec, tree[f'{part}_router'], rows)).tolist() for part in parts])
  if layers:
    pathlib.Path(workdir, 'experts.json').write_text(json.dumps(
        {'rows': spec.row_names(conditions), 'layers': layers, 'routers': list(spec.parts), 'coefficients': table}))


def _decide(spec: ModelSpec, params: Any, rows) -> jax.Array:
  """Coefficients [A, E] of one router."""
  router = routers.Router(spec.router, spec.width, spec.num_experts, spec.top_k, spec.noise_std, spec.router_names)
  return router.apply({'params': params}, rows, None).coef
