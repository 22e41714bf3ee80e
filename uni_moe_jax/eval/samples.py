"""Some predictions to look at: samples.json for the report."""

import base64
import io
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

_SHOWN = 12  # per evaluator
_ENLARGED = 64  # pixels a side


def _png(image: np.ndarray) -> str:
  """Base64 PNG of uint8 [H, W] or [H, W, 3]."""
  out = io.BytesIO()
  Image.fromarray(image).resize((_ENLARGED, _ENLARGED), Image.Resampling.NEAREST).save(out, 'PNG')
  return base64.b64encode(out.getvalue()).decode()


class Samples:
  """Collects the first predictions of each evaluator, evenly spread over its examples."""

  def __init__(self):
    self._sections: dict[str, list[dict]] = {}

  def add(
      self, section: str, pixels: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, truth: Sequence[str],
      predicted: Sequence[str]) -> None:
    """Adds images or videos with their references and predictions.

    Args:
      section: name of the evaluator.
      pixels: ids → uint8 [n, T, H, W] or [n, T, H, W, C]; an image is a video of one frame.
      ids: of the examples [N]. truth, predicted: [N] texts each.
    """
    chosen = np.unique(np.linspace(0, len(ids) - 1, _SHOWN).astype(int))
    for i, video in zip(chosen, pixels(ids[chosen])):
      frames = [_png(f[..., 0] if f.ndim == 3 and f.shape[-1] == 1 else f) for f in video]
      shown = {'image': frames[0]} if len(frames) == 1 else {'frames': frames}
      self._sections.setdefault(section, []).append(
          {**shown, 'reference': str(truth[i]), 'prediction': str(predicted[i])})

  def write(self, path: str | os.PathLike[str]) -> None:
    """{section: [{'image' or 'frames', 'reference', 'prediction'}]}."""
    pathlib.Path(path).write_text(json.dumps(self._sections))
