"""Tasks of preparation as a pipeline of Apache Beam, on one machine or many.

Beam's pins exclude versions that this package needs (Pillow, protobuf, pyarrow). So the pipeline runs in an environment
of its own, which has what the tasks need in the versions of this one, and which is made once. Where this module is run
as a program, it is the pipeline.
"""

import contextlib
import importlib.metadata
import importlib.util
import pickle
import sys
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np

from uni_moe_jax.cli import environments
from uni_moe_jax.data.formats.archives import open_binary
from uni_moe_jax.data.prepare.workers import Task
from uni_moe_jax.io import storage
from uni_moe_jax.utils.errors import RunError

_BEAM = 'apache-beam[gcp]==2.77.0'
_SAME_VERSIONS = ('absl-py', 'array_record', 'av', 'etils', 'gcsfs', 'importlib_resources', 'ml_collections', 'numpy',
                  's3fs', 'tensorflow-datasets')  # as in this environment, if they are there
_BESIDE_BEAM = ('pillow',)  # as in this environment, although Beam excludes it: it rewrites images


def run(tasks: Iterable[Task], num_tasks: int, what: str, folder: storage.Path, options: Sequence[str]) -> None:
  """Runs tasks.

  Args:
    what: 'read', of the name of the pipeline.
    folder: that all workers reach, for the tasks.
    options: of Beam, such as --runner=DataflowRunner.

  Raises:
    RunError: the pipeline failed, or its environment could not be made.
  """
  if not num_tasks:
    return
  storage.make_folder(folder)
  offsets = [0]
  with tempfile.TemporaryDirectory() as temporary:
    with open(path := f'{temporary}/tasks', 'wb') as file:
      for task in tasks:
        pickle.dump(task, file)
        offsets.append(file.tell())
    storage.move_file(path, folder / f'{what}.pickle')
  storage.write_bytes(folder / f'{what}.offsets', np.array(offsets, np.int64).tobytes())
  if code := environments.run(_python(), __spec__.name, str(folder / what), str(num_tasks), *options):
    raise RunError(f'the pipeline of Apache Beam ended with code {code}, see above; what is done is kept, the same '
                   'command continues.')


def _python() -> str:
  """The interpreter of an environment with Beam; it is made if there is none."""
  if importlib.util.find_spec('apache_beam'):
    return sys.executable
  pins = {}
  for name in (*_SAME_VERSIONS, *_BESIDE_BEAM):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      pins[name] = f'{name}=={importlib.metadata.version(name)}'
  beside = [pins.pop(name) for name in _BESIDE_BEAM if name in pins]
  return environments.python('beam', 'Apache Beam', '1 GB', [_BEAM, *pins.values()], ['--no-deps', *beside])


def _numbers(count: int) -> list[int]:
  return list(range(count))


def _run_task(number: int, address: str) -> int:
  """Runs one of the tasks in a file."""
  with open_binary(f'{address}.offsets') as file:
    file.seek(8 * number)
    start, stop = np.frombuffer(file.read(16), np.int64).tolist()
  with open_binary(f'{address}.pickle') as file:
    file.seek(start)
    return pickle.loads(file.read(stop - start))()


def _main(address: str, num_tasks: str, *options: str) -> None:
  import apache_beam as beam
  from apache_beam.options.pipeline_options import PipelineOptions

  from uni_moe_jax.data.prepare import on_beam  # workers do not know the functions of a program
  with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
    _ = (pipeline | beam.Create([int(num_tasks)]) | beam.FlatMap(on_beam._numbers) | beam.Reshuffle()
         | beam.Map(on_beam._run_task, address))


if __name__ == '__main__':
  _main(*sys.argv[1:])
