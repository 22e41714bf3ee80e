"""A trained model as a folder that runs without this package.

It has the programs, the parameters, the features of the target sets, the tokenizer and a model card. Every program
takes the parameters as arguments: params.safetensors stores them once, a program is small and the same for every
checkpoint of a model, and parameters stay on the device between calls. `loader.py` (load.py in the folder) reads
everything with jax, numpy and flatbuffers; `texts.py` tokenizes and detokenizes.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from uni_moe_jax.convert import torch_file
from uni_moe_jax.data.batches.assemble import Data
from uni_moe_jax.data.shards import mirror
from uni_moe_jax.data.text.clip_tokenizer import SURPLUS_SPACES, ClipTokenizer
from uni_moe_jax.data.text.tokenizer import Tokenizer
from uni_moe_jax.export import browser, description, model_card, onnx_programs, torch_dense
from uni_moe_jax.export.contents import Contents
from uni_moe_jax.export.programs import programs
from uni_moe_jax.io import storage
from uni_moe_jax.io.files import atomic_folder
from uni_moe_jax.model.uni_perceiver import UniPerceiver
from uni_moe_jax.utils.errors import UsageError
from uni_moe_jax.utils.tree_paths import by_path

_SHIPPED = {'loader.py': 'load.py', 'texts.py': 'texts.py', 'example.py': 'example.py'}
_ONNX = {'onnx', 'browser'}  # formats with ONNX models
_CARD, _PIECES = 'README.md', 'tokenizer_pieces.json'


def prepare(formats: Collection[str], dtype: Any, data: Data) -> None:
  """Gets what formats need, before minutes of work that would be lost without it.

  dtype: of the export's products. data: of the run.

  Raises:
    UsageError: something is not installed, or a format does not have these products or this tokenizer. RunError: it
      cannot be fetched.
  """
  if _ONNX & {*formats}:
    onnx_programs.check_dtype(dtype)
  if 'torch' in formats:
    torch_file.check_installed()
  if 'browser' in formats:
    browser.check_tokenizer(data.tokenizer, data.tokenizer_file)
    browser.fetch()
  if _ONNX & {*formats}:
    onnx_programs.python()


def write(
    folder: str | os.PathLike[str], contents: Contents, provenance: dict[str, Any], evaluation: list[dict[str, Any]],
    formats: Collection[str] = (), write_start: Callable[[pathlib.Path], None] | None = None) -> str:
  """Writes the folder atomically; returns what its parts weigh, as one line.

  Args:
    folder: must not exist.
    contents: what is exported.
    provenance: origin of the parameters as JSON: config, data, versions, step, seed, commits.
    evaluation: rows of evaluation.json for the model card; [] if the step was not evaluated.
    formats: also written: 'torch', model.pth in the layout of the published dense model; 'onnx', a model for each
      program that can be converted; 'browser', a page that runs these.
    write_start: adds to a folder what a run needs to start from it.

  Raises:
    UsageError: the folder exists, or a format cannot represent the model.
  """
  folder = storage.path(folder)
  if folder.exists():
    raise UsageError(f'--output={folder} exists; choose another folder or remove it.')
  onnx = _ONNX & {*formats}
  prepare(formats, contents.spec.dtype, contents.data)
  state = torch_dense.state(contents.spec, contents.params, contents.tasks) if 'torch' in formats else None
  with atomic_folder(folder, is_reproducible=False) as staging:
    files = _write_programs(staging, contents)
    save(staging / 'params.safetensors', {path: np.asarray(x) for path, x in by_path(contents.params).items()})
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((staging / 'orbax').absolute(), contents.params)
    if write_start is not None:
      write_start(staging)
    if state is not None:
      torch_file.write(staging / 'model.pth', state)
    save(staging / 'target_sets.safetensors', contents.features)
    save(staging / 'examples.safetensors', {
        f'{task}/{name}': x for task, fields in contents.examples.items() for name, x in fields.items()})
    tokenizer = write_tokenizer(staging, contents.data.tokenizer, contents.data.tokenizer_file)
    for source, name in (_SHIPPED | ({'onnx_model.py': 'onnx_model.py'} if onnx else {})).items():
      (staging / name).write_bytes(pathlib.Path(__file__).with_name(source).read_bytes())
    if onnx:
      onnx_programs.write(staging, contents.spec, contents.tasks, files, tokenizer['spe'], tokenizer['eot'])
    manifest = description.manifest(contents, files, tokenizer, provenance)
    if 'browser' in formats:
      browser.write(staging, browser.fetch())
    sums = {p.relative_to(staging).as_posix(): _checksum(p) for p in sorted(staging.rglob('*')) if p.is_file()}

    def write_last(name: str, text: str) -> None:
      (staging / name).write_text(text)
      sums[name] = _checksum(staging / name)

    manifest['files'] = sorted(sums)
    write_last('manifest.json', json.dumps(manifest, indent=1))
    card = model_card.card(manifest, evaluation, dict(sorted(sums.items())))
    (staging / _CARD).write_text(card)  # without a digest: a license is added to it on the Hub
    write_last('SHA256SUMS', ''.join(f'{digest}  {name}\n' for name, (digest, _) in sorted(sums.items())))
    return model_card.weights(sums)


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, file: pathlib.Path) -> dict[str, Any]:
  """Writes the tokenizer file, and its pieces if only this package can read it; returns the entry for `texts.py`."""
  name = 'tokenizer' + ''.join(file.suffixes[-2:] if file.suffix == '.gz' else file.suffixes[-1:])
  (folder / name).write_bytes(file.read_bytes())
  entry = {'type': 'sentencepiece', 'file': name, 'size': tokenizer.size, 'pad': tokenizer.pad, 'spe': tokenizer.spe,
           'eot': tokenizer.eot, 'special': sorted(tokenizer.special_ids)}
  if isinstance(tokenizer, ClipTokenizer):
    (folder / _PIECES).write_text(json.dumps([piece.hex() for piece in tokenizer.pieces]))
    entry |= {'type': 'clip', 'pieces': _PIECES, 'surplus_spaces': [spaces.pattern for spaces in SURPLUS_SPACES]}
  return entry


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file of arrays by name."""
  save_file({name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in arrays.items()}, path)
  path.chmod(0o644)  # safetensors makes files that only their owner can read


def _write_programs(folder: pathlib.Path, contents: Contents) -> dict[str, dict[str, dict[str, Any]]]:
  """Writes equal programs to one file; returns task → program → its file and inputs."""
  (folder / 'programs').mkdir()
  model, tokenizer = UniPerceiver(contents.spec), contents.data.tokenizer
  params, files, result = by_path(contents.params), {}, {}
  for exported in contents.tasks:
    task = exported.task.name
    entries = result[task] = {}
    for name, program in programs(model, exported, tokenizer.spe, tokenizer.eot).items():
      data = bytes(program.lowered(params).serialize())
      file = files.setdefault(hashlib.sha256(data).digest(), f'programs/{task}.{name}.stablehlo')
      (folder / file).write_bytes(data)
      entries[name] = {'file': file, 'inputs': {k: _type_of(k, x) for k, x in program.inputs.items()}}
  return result


def _type_of(name: str, x: Any) -> str:
  """'uint8[b, 1, 32, 32, 3]'"""
  if name == 'cache':
    return 'the cache that prefill or the previous step returned'
  return f'{np.dtype(x.dtype).name}[{", ".join(map(str, x.shape))}]'


def _checksum(path: pathlib.Path) -> tuple[str, int]:
  """(sha256, bytes) of a file."""
  size, digest = mirror.size_and_digest(path)
  return digest, size
