"""What an artifact says of itself in JSON: the model that is left, how it was trained, its tasks and sets, where it comes from."""

import dataclasses
from typing import Any

import jax
import numpy as np

from uni_moe_jax.export import loader
from uni_moe_jax.export.contents import Contents
from uni_moe_jax.export.programs import Asked
from uni_moe_jax.model.spec import ModelSpec, router_input_name
from uni_moe_jax.moe import routers

_EXPERTS = ('num_experts', 'top_k', 'placement', 'sublayers')
_OF_EXPERTS = (*_EXPERTS, 'noise_std', 'capacity_factor', 'gmm', 'router_names', 'kernels')  # fields that mean nothing without
_PROTOCOL = ('type', 'split', 'beam_size', 'length_penalty', 'constrain_to', 'num_views', 'num_crops')  # of an evaluator: how it asks


def manifest(
    contents: Contents, files: dict[str, dict[str, Any]], tokenizer: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
  """The manifest; `format` stands first, where a loader looks for it before it reads anything else.

  Args:
    contents: what is exported. files: task → program → its file and inputs.
    tokenizer: what `texts.py` needs to know.
    provenance: where it comes from.
  """
  return {
      'format': loader.FORMAT,
      'model': _model(contents.spec, contents.params),
      'trained': _trained(contents.trained),
      'tasks': {a.task.name: _task(a, files[a.task.name], contents.spec) for a in contents.asked},
      'sets': {name: {'size': target.size, 'texts': list(target.names), 'condition': str(s.condition)}
               for name, (s, target) in contents.sets.items()},
      'evaluators': {e.name: {'task': e.task.name, **{field: getattr(e, field) for field in _PROTOCOL}}
                     for e in contents.evaluators},
      'tokenizer': tokenizer,
      'examples': contents.answers,
      'provenance': {**provenance, 'jax': jax.__version__},
  }


def _model(spec: ModelSpec, params: Any) -> dict[str, Any]:
  fields = {**dataclasses.asdict(spec), 'dtype': np.dtype(spec.dtype).name,
            'kernels': {router_input_name(row): k for row, k in spec.kernels},
            'parameters': sum(np.size(x) for x in jax.tree.leaves(params))}
  return {name: x for name, x in fields.items() if spec.router != routers.DENSE or name not in _OF_EXPERTS}


def _trained(spec: ModelSpec) -> dict[str, Any]:
  """How the model was trained; `layers` are those that had experts."""
  layers = [i for i, parts in enumerate(spec.pattern) if parts]
  return {'dtype': np.dtype(spec.dtype).name, 'router': spec.router, 'layers': layers,
          **({name: getattr(spec, name) for name in _EXPERTS} if layers else {})}


def _task(asked: Asked, files: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
  task = asked.task
  kernel = lambda c: spec.kernel_of(c) if spec.kernels else 0
  return {
      'type': task.type.name, 'set': task.target_set, 'max_len': task.max_len, 'template': task.template,
      'temperature': task.temperature, 'beam_size': asked.beams, 'length_penalty': asked.penalty,
      'conditions': {str(c): kernel(c) for c in asked.conditions}, 'programs': files}
