"""Command lines: help, and mistakes, which are one sentence and exit code 2, before slow imports."""

import pytest

from tests.helpers import in_process, processes

_QUICKSTART, _NONE = '--config=configs/quickstart.py', '--workdir={folder}/none'
_TWO_SETS = 'error: --at_init and --step name two sets of parameters; give one.'
_NO_RUN = 'holds no run (config.json is missing)'


# One of each script, in a process of its own.
_ALONE = [
    ('interference', (_NONE, '--at_init'), _NO_RUN),
    ('experts', (_NONE,), _NO_RUN),
    ('preflight', (_QUICKSTART, '--topology=cpu:2', '--output=/no/where.json'),
     '--output=/no/where.json: its folder does not exist'),
    ('train', (_QUICKSTART,), '--workdir'),
    ('evaluate', (_NONE,), _NO_RUN),
    ('sweep', ('--sweep=adaptation', '--workdir={folder}/out'), '--sweep=adaptation needs --run'),
    ('serve', ('--model=gs://b/x',), 'must be a path of a disk'),
    ('export', ('--output={folder}/out',), 'workdir'),
]
_OTHERS = [
    ('interference', (_NONE, '--at_init', '--step=3'), _TWO_SETS),
    ('interference', (_NONE, '--layers=3,last'),
     "error: --layers=3,last: 'last' is not an index; write --layers=3,7,11."),
    ('interference', (_NONE, '--num_batches=1'), 'flag --num_batches=1'),
    ('experts', (_NONE, '--at_init', '--step=3'), _TWO_SETS),
    ('experts', (_NONE, '--num_batches=0'), 'flag --num_batches=0'),
    ('preflight', (_QUICKSTART, '--topology=v5e:16'),
     "--topology='v5e:16' must give 2 sizes of chips, for example v5e:16x16."),
    ('preflight', (_QUICKSTART, '--topology=cpu:2', '--config.model.num_heads=5'),
     'config.model.width=128 must be a multiple of config.model.num_heads=5'),
    ('export', (_NONE, '--output={folder}/out'), _NO_RUN),
    ('export', ('--workdir={folder}',), 'output'),
]


@pytest.mark.parametrize('python, script, arguments, message', [
    *((processes.python, *mistake) for mistake in _ALONE), *((in_process.python, *mistake) for mistake in _OTHERS)])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, python, script, arguments, message):
  done = python(f'launch/{script}.py', *(a.format(folder=tmp_path) for a in arguments))
  assert (done.returncode, done.stdout) == (2, ''), done.stderr
  assert done.stderr.startswith('error: ') and message in done.stderr and done.stderr.count('\n') == 1, done.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('script, expected', [
    ('train', ('config', 'workdir', 'distributed', 'coordinator_address')),
    ('experts', ('config', 'workdir', 'step', '[no]at_init', 'num_batches')),
    ('keep_running', ('max_restarts', 'backoff'))])
def test_help_lists_the_flags_that_scripts_share(script, expected):
  done = processes.python(f'launch/{script}.py', '--help')
  assert all(f'\n  --{flag}: ' in done.stdout for flag in expected), done.stdout
  assert done.returncode == 0
