"""Some predictions to look at: samples.json for the report."""

import base64
import io
import json
import os
import pathlib

import numpy as np
from PIL import Image

from uni_moe_jax.plan import Evaluation
from uni_moe_jax.data.records import Records

_SHOWN = 12  # per evaluator
_ENLARGED = 64  # pixels a side


def _png(picture: np.ndarray) -> str:
  """Base64 PNG of uint8 [H, W] or [H, W, 3]."""
  out = io.BytesIO()
  Image.fromarray(picture).resize((_ENLARGED, _ENLARGED), Image.Resampling.NEAREST).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()


class Samples:
  """Collects the first predictions of each evaluator, evenly spread over its examples."""

  def __init__(self):
    self._sections: dict[str, list[dict]] = {}

  def captions(self, evaluation: Evaluation, records: Records, ids, truth, predicted) -> None:
    """Pictures or clips with what they are called and what the model says."""
    self._add(f'{evaluation.name}', records, ids, truth, predicted)

  def classes(self, evaluation: Evaluation, records: Records, ids, truth, predicted) -> None:
    """Pictures or clips with their class and the most likely one; texts are left out."""
    if 'pixels' in records.columns:
      self._add(f'{evaluation.name}', records, ids, truth, predicted)

  def write(self, path: str | os.PathLike[str]) -> None:
    """{section: [{'image' or 'frames', 'reference', 'prediction'}]}."""
    pathlib.Path(path).write_text(json.dumps(self._sections))

  def _add(self, section: str, records: Records, ids, truth, predicted) -> None:
    for i in np.unique(np.linspace(0, len(ids) - 1, _SHOWN).astype(int)):
      pixels = records.columns['pixels'][ids[i]]
      shown = {'image': _png(pixels)} if pixels.ndim == 2 else {'frames': [_png(f) for f in pixels]}
      self._sections.setdefault(section, []).append(
          {**shown, 'reference': str(truth[i]), 'prediction': str(predicted[i])})
