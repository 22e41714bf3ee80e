"""A finished model as a folder that runs without this package: programs, parameters, features of sets, tokenizer, model card.

Every program takes the parameters as arguments. They lie once in params.safetensors, however many programs there are; a program
is then small, the same for every checkpoint of a model, and its parameters stay on the device from call to call. `loader.py`,
which goes into the folder as load.py, reads it all with jax, numpy and flatbuffers; `texts.py` knows its texts.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from uni_moe_jax.data.pipeline import npz_records
from uni_moe_jax.data.pipeline.clip_tokenizer import ClipTokenizer
from uni_moe_jax.data.pipeline.tokenizer import Tokenizer
from uni_moe_jax.export import description as manifest_lib
from uni_moe_jax.export import model_card, torch_dense, torch_file
from uni_moe_jax.export.contents import Contents
from uni_moe_jax.export.programs import Program, programs
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path

_SHIPPED = {'loader.py': 'load.py', 'texts.py': 'texts.py', 'example.py': 'example.py'}
_SUMS, _CARD, _MANIFEST, _TORCH = 'SHA256SUMS', 'README.md', 'manifest.json', 'model.pth'
_PIECES = 'tokenizer_pieces.json'


def write(
    folder: str | os.PathLike[str], contents: Contents, provenance: dict[str, Any], evaluation: list[dict[str, Any]],
    torch: bool = False) -> None:
  """Writes the folder, whole or not at all.

  Args:
    folder: must not exist.
    contents: what is exported.
    provenance: where it comes from, as JSON: config, data, versions, step, seed, commits.
    evaluation: rows of evaluation.json, for the card; [] without one.
    torch: adds model.pth, in the layout of the published dense model.

  Raises:
    UsageError: the folder is there, or the published layout has no place for the model.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise UsageError(f'--output={folder} is there already; give another, or remove it.')
  state = torch_dense.state(contents.spec, contents.params, contents.asked) if torch else None
  with npz_records.atomic_folder(folder) as here:
    files = _programs(here, contents)
    _parameters(here, contents.params)
    if state is not None:
      torch_file.write(here / _TORCH, state)
    save(here / 'sets.safetensors', contents.features)
    save(here / 'examples.safetensors', {
        f'{task}/{name}': x for task, fields in contents.examples.items() for name, x in fields.items()})
    tokenizer = write_tokenizer(here, contents.data.tokenizer, contents.data.tokenizer_file)
    for source, name in _SHIPPED.items():
      (here / name).write_bytes(pathlib.Path(__file__).with_name(source).read_bytes())
    manifest = manifest_lib.manifest(contents, files, tokenizer, provenance) | {'files': sorted([_CARD, *_sums(here)])}
    (here / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    (here / _CARD).write_text(model_card.card(manifest, evaluation, _sums(here)))
    (here / _SUMS).write_text(''.join(f'{digest}  {name}\n' for name, (digest, _) in _sums(here).items()))


def write_tokenizer(here: pathlib.Path, tokenizer: Tokenizer, file: pathlib.Path) -> dict[str, Any]:
  """Writes a tokenizer's file, and the pieces of one that only this package can read; returns what `texts.py` needs to know."""
  name = 'tokenizer' + ''.join(file.suffixes[-2:] if file.suffix == '.gz' else file.suffixes[-1:])
  (here / name).write_bytes(file.read_bytes())
  facts = {'kind': 'sentencepiece', 'file': name, 'size': tokenizer.size, 'pad': tokenizer.pad, 'spe': tokenizer.spe,
           'eot': tokenizer.eot, 'special': sorted(tokenizer.special_ids)}
  if isinstance(tokenizer, ClipTokenizer):
    (here / _PIECES).write_text(json.dumps([piece.hex() for piece in tokenizer.pieces]))
    facts |= {'kind': 'clip', 'pieces': _PIECES}
  return facts


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """A safetensors file of arrays by name."""
  save_file({name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in arrays.items()}, path)
  path.chmod(0o644)  # that library's files are for their owner alone


def _programs(here: pathlib.Path, contents: Contents) -> dict[str, dict[str, dict[str, Any]]]:
  """Writes every program, equal ones once; task → program → its file and inputs."""
  (here / 'programs').mkdir()
  model, tokenizer = UniPerceiver(contents.spec), contents.data.tokenizer
  params, known, found = by_path(contents.params), {}, {}
  for asked in contents.asked:
    task = asked.task.name
    found[task] = {}
    for name, program in programs(model, asked, tokenizer.spe, tokenizer.eot).items():
      data = bytes(lowered(program, params).serialize())
      digest = hashlib.sha256(data).hexdigest()
      if digest not in known:
        known[digest] = f'programs/{task}.{name}.stablehlo'
        (here / known[digest]).write_bytes(data)
      found[task][name] = {'file': known[digest], 'inputs': _described(program, name)}
  return found


def lowered(program: Program, params: dict[str, Any]) -> jax.export.Exported:
  """A program for every platform, without the places in source files that its operations come from: they name folders of the
  exporter's machine, and would make equal programs differ."""
  before = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    return program.lowered(params)
  finally:
    jax.config.update('jax_traceback_in_locations_limit', before)


def _described(program: Program, name: str) -> dict[str, Any]:
  """{input: 'uint8[b, 1, 32, 32, 3]'}"""
  def one(x):
    return f'{np.dtype(x.dtype).name}[{", ".join(map(str, x.shape))}]'
  return {k: 'what prefill or the last step gave' if k == 'cache' else one(x) for k, x in program.inputs.items()}


def _parameters(here: pathlib.Path, params: Any) -> None:
  """As safetensors, and as an Orbax checkpoint of the tree."""
  save(here / 'params.safetensors', {path: np.asarray(x) for path, x in by_path(params).items()})
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((here / 'orbax').absolute(), params)


def _sums(here: pathlib.Path) -> dict[str, tuple[str, int]]:
  """{file: (sha256, bytes)} of what lies in a folder, in order."""
  paths = sorted(p for p in here.rglob('*') if p.is_file())
  return {p.relative_to(here).as_posix(): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_size) for p in paths}
