"""The manifest of an exported folder: the model, its training, its tasks and target sets, and its provenance."""

import dataclasses
from typing import Any

import jax
import numpy as np

from uni_moe_jax.data.text.templates import template_parts
from uni_moe_jax.export import loader
from uni_moe_jax.export.contents import Contents
from uni_moe_jax.export.programs import ExportedTask
from uni_moe_jax.model.spec import ModelSpec, router_input_name
from uni_moe_jax.moe import routers

_EXPERTS = ('num_experts', 'top_k', 'placement', 'sublayers')
# Fields of experts and their routers, and of an evaluator.
_EXPERT_FIELDS = (*_EXPERTS, 'noise_std', 'capacity_factor', 'gmm', 'router_names', 'kernels')
_DIGITS = 4  # of the weights of experts
_PROTOCOL = (
    'type', 'split', 'beam_size', 'length_penalty', 'rerank_by', 'max_len', 'detokenize', 'num_views',
    'num_crops')


def manifest(
    contents: Contents, files: dict[str, dict[str, Any]], tokenizer: dict[str, Any],
    provenance: dict[str, Any]) -> dict[str, Any]:
  """Returns the manifest; `format` comes first, because a loader reads it before anything else.

  files: task → program → its file and inputs. tokenizer: entry for `texts.py`. provenance: origin of the parameters.
  """
  spec, trained = contents.spec, contents.trained
  model = {**dataclasses.asdict(spec), 'dtype': np.dtype(spec.dtype).name,
           'kernels': {router_input_name(condition): kernel for condition, kernel in spec.kernels},
           'parameters': sum(np.size(x) for x in jax.tree.leaves(contents.params))}
  del model['cpu_bfloat16']  # of training alone
  moe_layers = [i for i, sublayers in enumerate(trained.pattern) if sublayers]
  return {
      'format': loader.FORMAT,
      'model': {name: x for name, x in model.items() if spec.router != routers.DENSE or name not in _EXPERT_FIELDS},
      'trained': {'dtype': np.dtype(trained.dtype).name, 'router': trained.router, 'moe_layers': moe_layers,
                  **({name: getattr(trained, name) for name in _EXPERTS} if moe_layers else {})},
      'tasks': {e.task.name: _task(e, files[e.task.name], spec) for e in contents.tasks},
      'target_sets': {name: {'size': target.size, 'texts': list(target.names), 'condition': str(s.condition),
                             'max_len': s.max_len}
                      for name, (s, target) in contents.target_sets.items()},
      'mixtures': {str(c): {str(layer): {s: np.round(x, _DIGITS).astype(float).tolist() for s, x in sublayers.items()}
                            for layer, sublayers in layers.items()} for c, layers in contents.mixtures.items()},
      'evaluators': {e.name: {'task': e.task.name, **{field: getattr(e, field) for field in _PROTOCOL}}
                     for e in contents.evaluators},
      'tokenizer': tokenizer,
      'examples': contents.answers,
      'provenance': {**provenance, 'jax': jax.__version__},
  }


def _task(exported: ExportedTask, files: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
  task = exported.task
  kernel = lambda c: spec.kernel_of(c) if spec.kernels else 0
  return {
      'type': task.type.name, 'readout': task.type.readout, 'target': task.type.target, 'target_set': task.target_set,
      'media': exported.media, 'num_frames': exported.num_frames, 'frame_stride': task.frame_stride, 'crop': task.crop,
      'max_len': task.max_len, 'template': task.template, 'template_parts': template_parts(task.template),
      'temperature': task.temperature, 'beam_size': exported.beam_size, 'length_penalty': exported.length_penalty,
      'conditions': {str(c): kernel(c) for c in exported.conditions},
      'input_conditions': [str(c) for c in task.type.conditions],
      'text_condition': None if exported.text_condition is None else str(exported.text_condition), 'programs': files}
