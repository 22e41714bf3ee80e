"""Scores of single examples, so that two runs can be compared example by example."""

import io
import os
from collections.abc import Iterable

import numpy as np

from uni_moe_jax.eval.metrics import Score
from uni_moe_jax.io import storage

FILE = 'evaluation_examples.npz'  # of the step that evaluation.json has


def write(workdir: str | os.PathLike[str], scores: Iterable[tuple[str, Score]]) -> None:
  """Writes those of every metric that is a mean over examples; scores: (name of the evaluator, score)."""
  arrays = {}
  for evaluator, score in scores:
    if (values := score.per_example) is not None:
      weights = np.ones(len(values)) if score.weights is None else score.weights
      arrays[f'{evaluator}/{score.name}'] = np.stack([values, weights]).astype(np.float32)
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  storage.write_bytes(storage.path(workdir) / FILE, content.getvalue())


def read(workdir: str | os.PathLike[str]) -> dict[tuple[str, str], np.ndarray]:
  """Returns (evaluator, metric) → values and weights, float32 [2, N]; nothing if the run is not evaluated.

  The value in evaluation.json is the weighted mean of the values; that of perplexity is exp of minus the mean. Examples
  have the same order in all runs on the same data: it depends on the data and on the evaluator's name alone.
  """
  path = storage.path(workdir) / FILE
  if not path.exists():
    return {}
  with np.load(io.BytesIO(path.read_bytes())) as arrays:
    return {(key.rpartition('/')[0], key.rpartition('/')[2]): arrays[key] for key in arrays.files}
