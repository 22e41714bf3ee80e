"""A trained run as plain functions: images, videos and texts in; names, captions and features out."""

import dataclasses
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uni_moe_jax.config.plan import TaskSpec, why_not_rerank
from uni_moe_jax.data.batches.mixtures import evaluation_batches
from uni_moe_jax.data.batches.target_sets import build_target_set
from uni_moe_jax.data.examples.features import template_features
from uni_moe_jax.data.text.templates import fill_template
from uni_moe_jax.eval.batches import Fields
from uni_moe_jax.eval.predictor import Predictor
from uni_moe_jax.io import storage
from uni_moe_jax.model.heads import normalize
from uni_moe_jax.train import checkpoint_choice
from uni_moe_jax.train import run as run_lib
from uni_moe_jax.train import workdir as workdir_lib
from uni_moe_jax.train.checkpoint import Checkpoints
from uni_moe_jax.utils import templates
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.suggest import nearest

_NAMES = 'names'  # the target set of names that a caller gives
_ROWS_AT_ONCE = 128  # that the model reads


def write_start(workdir: storage.Path, params: Any, step: int, provenance: Mapping[str, Any]) -> None:
  """Writes what another run needs to start from parameters: a config, from `workdir.provenance`, and a checkpoint."""
  workdir_lib.write_config(workdir, provenance)
  with Checkpoints(workdir, max_to_keep=1) as checkpoints:
    checkpoints.save(step, {'params': params})


def read(workdir: str | os.PathLike[str], config: Any, best: bool) -> tuple[run_lib.Run, Any, int]:
  """(run, parameters, step) of the newest checkpoint of a work directory, with a note if another one is the best.

  Args:
    workdir, config: of the run.
    best: whether to read the checkpoint with the best `train.best_metric` instead.
  """
  with Checkpoints(workdir, None, config.train.best_metric) as checkpoints:
    run = run_lib.build_to_read(config, workdir)
    chosen = run_lib.find_step(config, run.plan, checkpoints, workdir, best) if best else None
    params, step = run_lib.read_params(run, checkpoints, chosen)
  if (better := checkpoint_choice.best_step(workdir, config, step)) not in (None, step):
    print(f'note: this is the newest checkpoint, of step {step}; the best by config.train.best_metric is that of step '
          f'{better}, which --best reads.', file=sys.stderr, flush=True)
  return run, params, step


class TrainedRun:
  """The model of a work directory and its tasks, by the names that the run's config gives them. Use `load`.

  Images are uint8 [B, H, W, C] and videos uint8 [B, T, H, W, C], of the size and channels of the run's model.
  Other sizes are refused; resize and crop first.
  """

  def __init__(self, run: run_lib.Run, params: Any):
    self._run, self._predictor, self._params = run, run.predictor(params), params
    self._tasks = {t.name: t for t in (*run.plan.tasks, *run.plan.probes)}

  @classmethod
  def load(cls, workdir: str | os.PathLike[str], step: int | None = None) -> 'TrainedRun':
    """Loads the newest checkpoint of a work directory, or that of `step`, onto one device, whatever mesh trained it.

    Raises:
      MissingFileError: nothing was trained there. UsageError: it has no such checkpoint.
    """
    config = run_lib.on_one_device(workdir_lib.load_config(workdir))
    run = run_lib.build_to_read(config, workdir, jax.devices()[:1])
    with Checkpoints(workdir, max_to_keep=None) as checkpoints:
      return cls(run, run_lib.read_params(run, checkpoints, step)[0])

  @property
  def tasks(self) -> tuple[str, ...]:
    """Names of the run's tasks, trained ones first."""
    return tuple(self._tasks)

  def examples(self, task: str, split: str, number: int) -> np.ndarray:
    """The first images or videos of a split of a task's source, uint8."""
    examples = self._run.data.examples(self._task(task, visual=True), split)
    if not 1 <= number <= examples.size:
      raise UsageError(f'number={number} must be 1 to {examples.size}, the examples of split {split!r}.')
    batch = next(iter(evaluation_batches(examples, np.arange(number), number)))[0]
    pixels = batch['pixels'][:number]
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels

  def classify(
      self, task: str, images: np.ndarray, names: Sequence[str] = (), top: int = 5,
      columns: Mapping[str, str] | None = None, **texts: str) -> list[list[tuple[str, float]]]:
    """Per image or video the `top` most likely entries of the task's target set, or of `names`, with probabilities.

    Args:
      top: more than there are: all.
      columns: texts by column, as `texts`, also of columns with the name of an argument, such as {'top': 'a hat'}.
      texts: of the columns in the task's template, such as question='which script is it ?'.
    """
    spec = self._task(task, visual=True)
    if not spec.type.has_classes:
      raise UsageError(f'task {task!r} is of type {spec.type.name!r}, which has no classes; use `caption` or `embed`.')
    if not isinstance(columns, (Mapping, types.NoneType)):
      raise UsageError(f'columns={columns!r} must be a dict of texts by column.')
    columns = {**(columns or {}), **texts}
    if unknown := [name for name in columns if name not in templates.columns(spec.template)]:
      raise UsageError(f'{unknown[0]}=… is no argument of `classify`, nor a column of the template '
                       f'{spec.template!r} of task {task!r}; '
                       f'{nearest(unknown[0], ["names", "top", *templates.columns(spec.template)])}.')
    if others := [name for name, text in columns.items() if not isinstance(text, str)]:
      raise UsageError(f'{others[0]}={columns[others[0]]!r} must be one text, of all images.')
    if not isinstance(top, (int, np.integer)) or top < 1:
      raise UsageError(f'top={top!r} must be a whole number of at least 1.')
    predictor, entries = self._predictor, self._run.data.target_sets[spec.target_set].names
    fields = self._fields(images)
    if names := _as_list('names', () if names is None else names):
      trained = next(s for s in (*self._run.plan.sets, *self._run.plan.probe_sets) if s.name == spec.target_set)
      set_spec = dataclasses.replace(trained, name=_NAMES, entries=tuple(names), label_prompts=False)
      target = build_target_set(set_spec, tuple((name,) for name in names), self._run.data.tokenizer,
                                self._run.spec.model.spec.max_text_len)
      predictor = Predictor(self._run.spec.model, self._params, {_NAMES: (set_spec, target)}, self._run.data.tokenizer)
      spec, entries = dataclasses.replace(spec, target_set=_NAMES, linear_head=False), tuple(names)
    fields |= self._slot(spec, columns, len(images))
    probabilities = np.exp(np.concatenate(_in_parts(lambda rows: predictor.log_probabilities(
        predictor.inputs(spec.type, _take(fields, rows)), spec)[:, 0], len(images))))
    order = np.argsort(-probabilities, axis=1, kind='stable')[:, :top]
    return [[(entries[i], float(p[i])) for i in best] for p, best in zip(probabilities, order, strict=True)]

  def caption(self, task: str, images: np.ndarray, beam_size: int = 1, rerank_by: str = '') -> list[str]:
    """A caption per image or video, greedy at `beam_size=1`; see the field `rerank_by` of evaluators."""
    if beam_size < 1:
      raise UsageError(f'beam_size={beam_size} must be at least 1.')
    spec = self._task(task, visual=True)
    if spec.type.readout != 'queries':
      raise UsageError(f'task {task!r} is of type {spec.type.name!r}, which has no captions.')
    reranker = self._task(rerank_by, visual=True) if rerank_by else None
    if reranker and (problem := why_not_rerank(reranker, spec, beam_size, 'beam_size')):
      raise UsageError(f'rerank_by={rerank_by!r}{problem}')
    if reranker and reranker.temperature not in self._run.plan.temperatures:
      raise UsageError(f'rerank_by={rerank_by!r}: no trained task has its temperature {reranker.temperature!r}, so '
                       'that its scale is unknown.')
    pixels = np.asarray(self._fields(images)['pixels'])
    if not len(pixels):
      return []
    captions = _in_parts(
        lambda rows: self._predictor.captions(spec, pixels[rows], beam_size, reranker=reranker), len(pixels))
    return [self._run.data.tokenizer.detokenize(caption) for part in captions for caption in part]

  def embed(self, task: str, images: np.ndarray) -> np.ndarray:
    """Normalized features f32 [B, D] of images or videos, as a classification or retrieval task encodes them."""
    spec = self._task(task, visual=True)
    if spec.type.readout != 'cls':
      raise UsageError(f'task {task!r} is of type {spec.type.name!r}, which also reads a text; give a task that '
                       'classifies or retrieves what it reads.')
    fields = self._fields(images)
    return np.concatenate(_in_parts(
        lambda rows: normalize(self._predictor.inputs(spec.type, _take(fields, rows))[:, 0]), len(images)))

  def embed_text(self, task: str, texts: Sequence[str]) -> np.ndarray:
    """Normalized features f32 [N, D] of texts, as the target side of a retrieval task encodes them."""
    spec = self._task(task)
    if spec.type.target != 'pair':
      raise UsageError(f'task {task!r} is of type {spec.type.name!r}; only retrieval encodes a paired text.')
    texts = _as_list('texts', texts)
    return np.concatenate(_in_parts(
        lambda rows: normalize(self._predictor.texts(spec, [texts[i] for i in rows])), len(texts)))

  def _fields(self, images: np.ndarray) -> Fields:
    """The batch fields of images [B, H, W, C] or videos [B, T, H, W, C]."""
    images, model = np.asarray(images), self._run.spec.model.spec
    side, C = model.image_size, model.channels
    # The model would also take fewer pixels or channels, without a word.
    if images.ndim not in (4, 5) or images.dtype != np.uint8 or images.shape[-3:] != (side, side, C):
      raise UsageError(f'images are {images.dtype} {list(images.shape)}; this run takes images uint8 '
                       f'[B, {side}, {side}, {C}] and videos uint8 [B, T, {side}, {side}, {C}].')
    pixels = images[:, None] if images.ndim == 4 else images
    if not 1 <= pixels.shape[1] <= model.max_num_frames:
      raise UsageError(f'videos of {pixels.shape[1]} frames; this run takes 1 to {model.max_num_frames} '
                       '(config.model.max_num_frames).')
    return {'id': np.arange(len(images), dtype=np.uint32), 'pixels': pixels}

  def _slot(self, spec: TaskSpec, columns: Mapping[str, str], batch: int) -> Fields:
    """The batch fields of a template's text, the same for all examples; none for a task type without a slot."""
    if spec.type.readout != 'slot':
      return {}
    if missing := [name for name in templates.columns(spec.template) if name not in columns]:
      raise UsageError(f'task {spec.name!r} needs the text of {missing[0]!r}, a column of its template '
                       f'{spec.template!r}; give columns={{{missing[0]!r}: …}}.')
    tokenizer = self._run.data.tokenizer
    filled = fill_template(tokenizer, spec.template, columns, spec.max_len)
    return {**template_features([filled] * batch, spec, tokenizer, training=False)}

  def _task(self, name: str, visual: bool = False) -> TaskSpec:
    if name not in self._tasks:
      raise UsageError(f'task {name!r} is unknown; {nearest(name, self._tasks)}.')
    if visual and not self._tasks[name].type.visual:
      raise UsageError(f'task {name!r} reads text alone; give a task that reads images or videos.')
    return self._tasks[name]


def _in_parts(compute: Callable[[np.ndarray], Any], size: int) -> list[Any]:
  """compute(indices) of all rows, in parts of one shape, so of one program: the last one repeats its last row."""
  if size <= _ROWS_AT_ONCE:
    return [compute(np.arange(size))]
  return [np.asarray(compute(np.minimum(np.arange(i, i + _ROWS_AT_ONCE), size - 1)))[:size - i]
          for i in range(0, size, _ROWS_AT_ONCE)]


def _take(fields: Fields, rows: np.ndarray) -> Fields:
  return {name: x[rows] for name, x in fields.items()}


def _as_list(argument: str, texts: Sequence[str]) -> list[str]:
  if isinstance(texts, str):  # it is a sequence of strings, too: its letters
    raise UsageError(f'{argument}={texts!r} is one text; give a list, [{texts!r}].')
  texts = list(texts)
  if others := [text for text in texts if not isinstance(text, str)]:
    raise UsageError(f'{argument} has the item {others[0]!r}, which must be a text.')
  return texts
