"""The authors' checkpoint files: safe reading, which executes no code, and writing.

Three layouts are supported: torch ({'model': state dict, 'optimizer': …}), DeepSpeed ({'module': …}) and older
DeepSpeed files with other names for the same tensors. All are read as arrays under the names of `torch_layout.py`. Only
this module needs PyTorch.
"""

import errno
import os
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_moe_jax.convert.torch_layout import PATCH_BIAS, VISUAL_TYPE, LayoutError
from uni_moe_jax.utils.errors import MissingFileError, disk_is_full

_STATES = ('model', 'module', 'state_dict')  # keys of the parameters; a file without them is a state dict itself
_WRAPPER = 'module.'  # prefix of a model saved inside DistributedDataParallel

# Older name → current name, in order. Attention projections have different names in dense models and models with
# experts.
_OLDER = (
    (r'^encoder\.', 'fused_encoder.'),
    (r'^predictor\.', 'loss_prepare.'),
    (r'\.deepspeed_moe\.(gate|experts)\.', r'.\1.'),
    (r'\.attention_output\.residual_scale$', '.gamma_1'),
    (r'\.ffn_output\.residual_scale$', '.gamma_2'),
    (r'\.ffn\.dense2\.', '.linear2.'),
    (r'\.ffn\.dense\.', '.linear1.'),
    (r'\.LayerNormModules\.0\.', '.norm1.'),
    (r'\.LayerNormModules\.1\.', '.norm2.'),
)
_OLDER_ATTENTION = {  # has experts → …
    False: ((r'\.attention\.self\.qkv_proj\.', '.self_attn.in_proj_'),
            (r'\.attention\.output\.dense\.', '.self_attn.out_proj.')),
    True: ((r'\.attention\.self\.qkv_proj\.', '.self_attn.qkv_proj.'),
           (r'\.attention\.output\.dense\.', '.self_attn.dense.')),
}
_UNUSED_OLDER = 'visual_embed.'


def _torch():
  try:
    import torch
  except ImportError:
    raise LayoutError("PyTorch checkpoints need PyTorch, which is an extra: pip install -e '.[torch]'.") from None
  return torch


def check_installed() -> None:
  """Raises LayoutError without PyTorch."""
  _torch()


def read(path: str | os.PathLike[str], keep_visual_type: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads the parameters of a checkpoint file.

  Args:
    path: file that torch.save wrote.
    keep_visual_type: whether the model has the parameter `visual_type`. If not, that of an older file is added to the
      bias of the patches, which is equivalent: older code added it to every visual token.

  Returns:
    (f32 arrays by published name, remarks on renamed and dropped names of the file: name → remark).

  Raises:
    MissingFileError: the file does not exist.
    LayoutError: the file is not a checkpoint, is truncated, has no parameters, or reading it would execute code
      (nothing is executed).
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise LayoutError(f'{path} is a folder; choose a file in it, such as mp_rank_00_model_states.pt.')
  if not path.is_file():
    raise MissingFileError(f'checkpoint {path} does not exist.')
  tensors = _state_of(_load(path), path)
  prefix = _WRAPPER if all(k.startswith(_WRAPPER) for k in tensors) else ''
  arrays = {k.removeprefix(prefix): v.detach().float().numpy() for k, v in tensors.items()}
  return _renamed(arrays, keep_visual_type)


def write(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
  """Writes {'model': state dict} atomically."""
  torch, path = _torch(), pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open('wb') as file:  # of a path PyTorch says only that writing failed, and not why
      torch.save({'model': {k: torch.from_numpy(np.array(v)) for k, v in state.items()}}, file)
    temporary.rename(path)
  except (OSError, RuntimeError) as e:
    if temporary.is_file():
      temporary.unlink()
    if disk_is_full(e):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
    raise LayoutError(f'{path} cannot be written ({type(e).__name__}); choose another --output.') from None


def _load(path: pathlib.Path) -> Any:
  try:
    return _torch().load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as e:
    refused = _refused(path, str(e))
    if not refused:
      raise _damaged(path, e) from None
    raise LayoutError(f'{path} needs {", ".join(refused)}, which could execute code: refused; nothing was '
                      'executed. Save only the state dict: torch.save({"model": model.state_dict()}, FILE).') from None
  except Exception as e:  # pylint: disable=broad-except; a damaged file can raise anything
    raise _damaged(path, e) from None


def _damaged(path: pathlib.Path, e: Exception) -> LayoutError:
  return LayoutError(f'{path} is not a PyTorch checkpoint, or is truncated or damaged ({type(e).__name__}).')


def _refused(path: pathlib.Path, message: str) -> list[str]:
  """Globals in a file that reading parameters does not need; of an older file format, the first one alone."""
  try:
    return sorted(_torch().serialization.get_unsafe_globals_in_checkpoint(path))
  except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
    return re.findall(r'(?:GLOBAL |Unsupported (?:global|class) )([\w.]+)', message)[:1]


def _state_of(loaded: Any, path: pathlib.Path) -> dict[str, Any]:
  """Returns the state dict in the contents of a file."""
  outer = loaded if isinstance(loaded, Mapping) else {}
  state = next((outer[name] for name in _STATES if isinstance(outer.get(name), Mapping)), outer)
  strange = [k for k, v in state.items() if not isinstance(k, str) or not isinstance(v, _torch().Tensor)]
  if not state or strange:
    entry = f', but its entry {strange[0]!r} is not a named tensor' if strange else ''
    raise LayoutError(f'{path} has no parameters: it should be a state dict or contain one under '
                      f'{", ".join(map(repr, _STATES))}{entry}.')
  return dict(state)


def _renamed(arrays: dict[str, np.ndarray], keep_visual_type: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Renames arrays of older files."""
  if not any(k.startswith(('encoder.', 'predictor.')) for k in arrays):
    return arrays, {}
  table = _OLDER + _OLDER_ATTENTION[any('.deepspeed_moe.' in k for k in arrays)]
  out, remarks = {}, {}
  for key, value in arrays.items():
    if key.startswith(_UNUSED_OLDER):
      remarks[key] = 'dropped: older code did not use it'
      continue
    name = key
    for pattern, new in table:
      name = re.sub(pattern, new, name)
    if name != key:
      remarks[key] = f'older name of {name}'
    if name in out:
      raise LayoutError(f'{key} and another key both map to {name}.')
    out[name] = value.reshape(-1) if name.endswith(('.gamma_1', '.gamma_2')) else value  # [1, 1, D] there
  if not keep_visual_type and {PATCH_BIAS, VISUAL_TYPE} <= set(out):
    out[PATCH_BIAS] = out[PATCH_BIAS] + out.pop(VISUAL_TYPE)[0]
    remarks[VISUAL_TYPE] = f'added to {PATCH_BIAS}: older code added it to every visual token'
  return out, remarks
