"""A TensorFlow SavedModel of an exported folder: its StableHLO programs, each called by one operation, XlaCallModule.

A signature TASK.PROGRAM takes the program's inputs by name and any batch, `targets` excepted: those are the stored
features of the task's target set. TASK.PROGRAM.targets takes them, too. Parameters and features are variables, stored
once. TensorFlow loads it without JAX, and so does TensorFlow Serving.
"""

import pathlib
from typing import Any

import jax
import jax.export

from uni_moe_jax.export import loader
from uni_moe_jax.export.programs import flat

# The newest version that TensorFlow 2.21 reads. JAX writes a newer one, which is why `jax2tf.convert` is not used.
_STABLEHLO = '1.13.7'
_PASSES = 'builtin.module(func.func(stablehlo-legalize-composite-to-call))'

Tensors = dict[str, Any]


def write(folder: pathlib.Path, tasks: dict[str, dict[str, Any]], target: pathlib.Path) -> None:
  """Writes a SavedModel.

  Args:
    folder: has the programs, parameters and features of an export.
    tasks: task → 'target_set' and 'programs' of its manifest.
    target: folder to write.
  """
  import tensorflow as tf
  module: Any = tf.Module()
  variables = lambda name: {path: tf.Variable(tf.constant(x), trainable=False, name=path)
                            for path, x in loader.tensors(folder / name).items()}
  module.params, module.features = variables('params.safetensors'), variables('target_sets.safetensors')
  programs, signatures = {}, {}
  for task, entry in tasks.items():
    for name, program in entry['programs'].items():
      file = program['file']
      if file not in programs:
        programs[file] = _function(folder / file, module.params)
      call, specs = programs[file]
      signature = f'{task}.{name}'
      if 'targets' in specs:
        signatures[f'{signature}.targets'] = call.get_concrete_function(**specs)
        call = _with_targets(call, module.features[entry['target_set']])
        specs = {field: spec for field, spec in specs.items() if field != 'targets'}
      signatures[signature] = call.get_concrete_function(**specs)
  tf.saved_model.save(module, str(target), signatures=signatures)


def _function(file: pathlib.Path, params: Tensors) -> tuple[Any, Tensors]:
  """(TensorFlow function of a program, its inputs as `TensorSpec` by name)."""
  import tensorflow as tf
  from tensorflow.compiler.tf2xla.python import xla
  exported = jax.export.deserialize(bytearray(file.read_bytes()))
  (_, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  module = _serialized(exported)
  sizes = lambda x: [None if jax.export.is_symbolic_dim(d) else d for d in x.shape]

  @tf.function(autograph=False)
  def call(**tensors):
    leaves = [tf.convert_to_tensor(x) for _, x in sorted(params.items())] + [tensors[name] for name in flat(inputs)]
    results: Any = xla.call_module(
        tuple(leaves[i] for i in exported.module_kept_var_idx), version=exported.calling_convention_version,
        module=module, Tout=[x.dtype for x in exported.out_avals], Sout=[sizes(x) for x in exported.out_avals],
        platforms=[name.upper() for name in exported.platforms])
    return dict(zip(flat(outputs), results, strict=True))

  return call, {name: tf.TensorSpec(sizes(x), x.dtype, name) for name, x in flat(inputs).items()}


def _serialized(exported: jax.export.Exported) -> bytes:
  """The program as TensorFlow reads it: with calls in place of composite operations, whose sizes it does not infer."""
  from jax.extend.mlir import ir, passmanager
  from jax.extend.mlir.dialects import stablehlo
  stablehlo.register_stablehlo_passes()
  with ir.Context() as context:
    stablehlo.register_dialect(context)
    module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
    passmanager.PassManager.parse(_PASSES).run(module.operation)
    return stablehlo.serialize_portable_artifact(module, _STABLEHLO)


def _with_targets(call: Any, targets: Any) -> Any:
  """The function with fixed targets, a variable."""
  import tensorflow as tf
  return tf.function(lambda **tensors: call(**tensors, targets=tf.convert_to_tensor(targets)), autograph=False)
