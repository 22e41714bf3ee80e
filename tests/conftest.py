"""Settings of JAX and TensorFlow for every test. They must be set before either is imported."""

import gc
import os
import pathlib
import signal
import sys

from absl import flags

from tests.helpers import fast_compile
from tests.helpers.object_stores import bucket, gcs, object_stores, s3, store  # noqa: F401 (fixtures)

_ROOT = pathlib.Path(__file__).resolve().parents[1]

if 'jax' in sys.modules or 'tensorflow' in sys.modules:
  raise RuntimeError('jax or tensorflow was imported before tests/conftest.py could configure it.')

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background jobs; programs would inherit it
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if os.environ['JAX_PLATFORMS'] == 'cpu':
  os.environ['CUDA_VISIBLE_DEVICES'] = '-1'  # TensorFlow must not allocate on a GPU that no test uses
# Tests of meshes need several devices; the other tests run on the first one and are not slower for it.
for option in fast_compile.environment_flags(8, '--xla_cpu_parallel_codegen_split_count=1').split():
  if option.partition('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {option}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_ROOT / '.pytest_cache/jax'))
# [B, S] + [S] is nearly always a mistake here, because every axis has a letter.
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'

# Tracing allocates so many objects that collections would take an eighth of the time.
gc.set_threshold(50_000, 10, 10)

# The temporary folders of absltest read a flag, and pytest does not parse absl's command line.
flags.FLAGS.mark_as_parsed()

if os.environ['JAX_PLATFORMS'] != 'cpu':
  import tensorflow as tf  # pylint: disable=wrong-import-position,g-import-not-at-top
  tf.config.set_visible_devices([], 'GPU')
