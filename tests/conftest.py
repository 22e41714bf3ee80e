"""Settings of JAX and TensorFlow for every test; they must stand before either is imported."""

import os
import pathlib
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]

if 'jax' in sys.modules or 'tensorflow' in sys.modules:
  raise RuntimeError('jax or tensorflow was imported before tests/conftest.py could configure it.')

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if os.environ['JAX_PLATFORMS'] == 'cpu':
  os.environ['CUDA_VISIBLE_DEVICES'] = '-1'  # TensorFlow must not take a GPU that no test uses
# Tests of meshes need several devices; others run on the first: more devices cost them nothing. Most of a test's time is
# the compiler's, and programs this small run as well without its optimizations.
for flag in (
    '--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1'):
  if flag.partition('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_ROOT / '.pytest_cache/jax'))
# [B, S] + [S] is nearly always a mistake here, where every axis has a letter.
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'

from absl import flags as absl_flags  # pylint: disable=wrong-import-position

# absltest's temporary folders read a flag, and pytest never parses absl's command line.
absl_flags.FLAGS.mark_as_parsed()

if os.environ['JAX_PLATFORMS'] != 'cpu':
  import tensorflow as tf  # pylint: disable=wrong-import-position,g-import-not-at-top
  tf.config.set_visible_devices([], 'GPU')
