"""The subprocess of `libtpu_plan`, which kills it before it ends."""

import pathlib
import pickle
import sys


def main(folder: pathlib.Path) -> None:
  """Compile the program that standard input names; XLA dumps its plan into the folder."""
  config, which, name = pickle.load(sys.stdin.buffer)
  import jax  # pylint: disable=g-import-not-at-top
  import ml_collections  # pylint: disable=g-import-not-at-top

  from uni_moe_jax.tools.preflight import compiled_programs, libtpu_plan, topology
  run = compiled_programs.prepare(ml_collections.ConfigDict(config), topology.devices(topology.parse(name)))
  options = {'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True}
  try:
    compiled_programs.lowered(run, which).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if not compiled_programs.is_too_large(error):
      raise
    (folder / libtpu_plan.ERROR_FILE).write_text(str(error))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
