"""An exported folder's programs as ONNX models, by jax2onnx.

Its pins exclude versions that this package needs. So programs are converted in an environment of its own, which is made
once; where this module is run as a program, it converts. A model reads its parameters from params.safetensors, beside
which it must stay: they are stored once. onnxruntime ran each, and its outputs were compared with those of StableHLO.
"""

import dataclasses
import json
import pathlib
import pickle
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from uni_moe_jax.cli import environments
from uni_moe_jax.export import loader
from uni_moe_jax.export.programs import ExportedTask, Program, flat, programs
from uni_moe_jax.kernels import gmm
from uni_moe_jax.model.spec import ModelSpec
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.moe import precision
from uni_moe_jax.utils.errors import RunError, UsageError

_PACKAGES = (
    'jax2onnx==0.17.1', 'onnx==1.23.2', 'onnx-ir==1.1.0', 'onnxruntime==1.32.0', 'jax==0.10.2', 'jaxlib==0.10.2',
    'flax==0.12.8', 'absl-py==2.5.1', 'chex==0.1.92', 'etils[epath]==1.15.0', 'ml_collections==1.1.0', 'numpy==2.4.6')
_OPSET = 21
_BATCHES = 1, 3
_TOLERANCE = 1e-5  # of the largest output
# A search is a loop whose state has a symbolic batch, of which jax2onnx has none.
_NOT_CONVERTED = {'caption': 'jax2onnx does not support loops over a symbolic batch; search with prefill and step'}
_SIZES = {'s': 4, 'm': 2, 'v': 5, 'c': 5}  # of inputs to compare outputs

Files = dict[str, dict[str, dict[str, Any]]]


def write(
    folder: pathlib.Path, spec: ModelSpec, tasks: tuple[ExportedTask, ...], files: Files, spe: int, eot: int) -> None:
  """Writes TASK.PROGRAM.onnx files, and adds the entry of each to that of its program, as 'onnx'.

  It is {'file', 'inputs', 'outputs', 'difference', 'cache_axes'}: names of arrays in order, the largest difference to
  the StableHLO program, and the batch axis of each array of a cache; or {'reason'} for a program that cannot be
  converted.

  Args:
    folder: has the StableHLO programs and params.safetensors.
    spec, tasks: of the exported model, see `check_dtype`.
    files: task → program → its entry with its StableHLO 'file'; equal programs share one, and so do their models.
    spe, eot: token ids.

  Raises:
    RunError: the environment cannot be made, or no program can be converted.
  """
  cases = {}
  for exported in tasks:
    for name, program in programs(UniPerceiver(spec), exported, spe, eot).items():
      file = files[exported.task.name][name]['file']
      if name not in _NOT_CONVERTED and file not in cases:
        cases[file] = _cases(program, folder, file, spec.vocab_size)
  with tempfile.TemporaryDirectory() as name:
    job = pathlib.Path(name, 'job')
    job.write_bytes(pickle.dumps((dataclasses.replace(spec, gmm=gmm.EVERY_EXPERT), tasks, files, spe, eot, cases)))
    if code := environments.run(python(), __spec__.name, str(folder), str(job)):
      raise RunError(f'the conversion to ONNX ended with exit code {code} (see above); nothing was exported.')
    _add(files, json.loads(job.with_suffix('.json').read_text()))


def _add(files: Files, converted: Files) -> None:
  """Adds the entries of converted programs, see `write`."""
  if all('reason' in entry for entries in converted.values() for entry in entries.values()):
    raise RunError('no program could be converted to ONNX, for the reasons above; nothing was exported.')
  for task, entries in converted.items():
    for name, entry in entries.items():
      files[task][name]['onnx'] = entry


def _cases(program: Program, folder: pathlib.Path, file: str, vocab_size: int) -> list[tuple[Any, list[np.ndarray]]]:
  """(inputs, outputs of the StableHLO program) at every batch size."""
  params = loader.tensors(folder / 'params.safetensors')
  run = jax.jit(jax.export.deserialize(bytearray((folder / file).read_bytes())).call)

  def inputs(batch):
    rng = np.random.default_rng(batch)

    def values(x):
      shape = [d if isinstance(d, int) else batch if str(d) == 'b' else _SIZES[str(d)] for d in x.shape]
      if x.dtype == np.bool_:
        return np.ones(shape, bool)
      if np.issubdtype(x.dtype, np.integer):
        return rng.integers(0, 256 if x.dtype == np.uint8 else min(vocab_size, _SIZES['s']), shape).astype(x.dtype)
      return rng.normal(size=shape).astype(x.dtype)
    return jax.tree.map(values, program.inputs)

  return [(x, jax.device_get(jax.tree.leaves(run(params, x)))) for x in map(inputs, _BATCHES)]


def check_dtype(dtype: Any) -> None:
  """Raises UsageError for products that onnxruntime has not on CPUs."""
  if np.dtype(dtype) != np.float32:
    raise UsageError(f'--onnx needs products in float32, but this export has {np.dtype(dtype).name}, which onnxruntime '
                     'does not support on CPUs; add --dtype=float32.')


def python() -> str:
  """The interpreter of an environment with jax2onnx and onnxruntime."""
  return environments.python('onnx', 'jax2onnx', '1.1 GB', _PACKAGES)


def _main(folder: pathlib.Path, job: pathlib.Path) -> None:
  import logging

  import onnxruntime
  logging.disable(logging.WARNING)
  onnxruntime.set_default_logger_severity(3)
  spec, tasks, files, spe, eot, cases = pickle.loads(job.read_bytes())
  params, model = loader.tensors(folder / 'params.safetensors'), UniPerceiver(spec)
  converted, result = {}, {}
  for exported in tasks:
    task = exported.task.name
    for name, program in programs(model, exported, spe, eot).items():
      if (file := files[task][name]['file']) not in converted:
        entry = converted[file] = ({'reason': _NOT_CONVERTED[name]} if name in _NOT_CONVERTED else
                                   _try(folder, program, params, f'{task}.{name}.onnx', cases[file]))
        if 'cache' in program.inputs:  # which axis of each array is the batch
          entry['cache_axes'] = [[str(d) for d in x.shape].index('b') for x in program.inputs['cache']]
        print(f'{task}.{name}: ' + (entry.get('reason') or f'ONNX, differs by {entry["difference"]:.1e}'), flush=True)
      result.setdefault(task, {})[name] = converted[file]
  job.with_suffix('.json').write_text(json.dumps(result))


def _try(folder: pathlib.Path, program: Program, params: dict[str, np.ndarray], file: str, cases: list[Any]
         ) -> dict[str, Any]:
  """Converts a program and compares it; returns its entry, see `write`."""
  try:
    inputs, outputs = _convert(folder, program, params, file)
    difference = float(np.max([_difference(_run(folder / file, x), want) for x, want in cases]))  # NaN if one is
  except Exception as e:  # of jax2onnx or of onnxruntime: this program has no model, and others may have one
    (folder / file).unlink(missing_ok=True)
    return {'reason': f'{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}'}
  if not difference <= _TOLERANCE:
    (folder / file).unlink()
    return {'reason': f'its outputs differ by {difference:.1e} of the largest value'}
  return {'file': file, 'inputs': inputs, 'outputs': outputs, 'difference': difference}


def _convert(folder: pathlib.Path, program: Program, params: dict[str, np.ndarray], file: str
             ) -> tuple[list[str], list[str]]:
  """Writes the model; returns the names of its inputs and outputs.

  jax2onnx traces with changed functions of JAX, which break on symbolic sizes. So it is given a program that is traced
  already, of which it replaces operations alone.
  """
  import jax.extend
  import onnx
  from jax._src.interpreters import partial_eval
  from jax2onnx import to_onnx
  shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in sorted(params.items())}
  leaves, structure = jax.tree.flatten((shapes, program.inputs))
  with precision.of_evaluation(program.dtype):
    closed, outputs = jax.make_jaxpr(
        lambda *x: program.run(*jax.tree.unflatten(structure, x)), return_shape=True)(*leaves)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
  inputs = list(flat(program.inputs))
  model = to_onnx(jax.extend.core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr)), leaves, opset=_OPSET,
                  input_names=[*shapes, *inputs])
  graph = model.graph
  for old, name in zip(list(graph.output), flat(outputs), strict=True):  # an output may be an input as it is
    graph.node.append(onnx.helper.make_node('Identity', [old.name], [f'new_{name}']))
    new = onnx.ValueInfoProto()
    new.CopyFrom(old)
    new.name = f'new_{name}'
    graph.output.append(new)
  del graph.output[:len(flat(outputs))]
  used = _used(graph)
  for value in [x for x in graph.input if x.name in shapes]:
    graph.input.remove(value)
    if value.name in used:
      graph.initializer.append(_stored(value.name, params[value.name], folder / 'params.safetensors'))
  onnx.save(model, folder / file)
  return inputs, list(flat(outputs))


def _used(graph: Any) -> set[str]:
  """Names that nodes read, those in bodies of loops included."""
  names = set()
  for node in graph.node:
    names |= {*node.input}
    for attribute in node.attribute:
      for body in (attribute.g, *attribute.graphs):
        names |= _used(body)
  return names


def _stored(name: str, x: np.ndarray, file: pathlib.Path) -> Any:
  """An array of a model that is in a safetensors file."""
  import onnx
  with open(file, 'rb') as content:
    size = int.from_bytes(content.read(8), 'little')
    begin, end = json.loads(content.read(size))[name]['data_offsets']
  tensor = onnx.TensorProto(name=name, dims=x.shape, data_type=onnx.TensorProto.FLOAT,
                            data_location=onnx.TensorProto.EXTERNAL)
  for key, value in dict(location=file.name, offset=8 + size + begin, length=end - begin).items():
    tensor.external_data.add(key=key, value=str(value))
  return tensor


def _run(file: pathlib.Path, inputs: Any) -> list[np.ndarray]:
  """Outputs of a model."""
  import onnxruntime
  session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
  taken = {x.name for x in session.get_inputs()}
  return session.run(None, {name: x for name, x in flat(inputs).items() if name in taken})


def _difference(got: list[np.ndarray], want: list[np.ndarray]) -> float:
  """The largest difference of outputs, as a fraction of the largest output."""
  parts = [np.abs(np.subtract(a, b, dtype=np.float64)).max() / max(np.abs(b).max(), 1e-30)
           for a, b in zip(got, want, strict=True) if np.issubdtype(b.dtype, np.floating) and b.size]
  wrong = [a for a, b in zip(got, want) if not np.issubdtype(b.dtype, np.floating) and not np.array_equal(a, b)]
  return float(np.max([*parts, *[np.inf] * len(wrong), 0.0]))  # NaN if one is, as it would not be by `max`


if __name__ == '__main__':
  _main(*map(pathlib.Path, sys.argv[1:]))
