"""What the scripts do in a bash that is older than that of the tests; macOS has 3.2."""

import os
import pathlib
import subprocess

import pytest
import yaml

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_ARGUMENTS = (r'--config=a\d"x', "--workdir=it's & $HOME", '--x=${NAME} ${ARGUMENTS}', '')


@pytest.mark.parametrize('version', ['', '4.2'])  # up to 4.2 quotes in a replacement are literal
def test_a_job_set_has_the_arguments_in_any_bash(version):
  command = ['launch/gke.sh', '--name', 'base', '--image', 'i:1', '--claim', 'n&s', '--dry_run', '--', *_ARGUMENTS]
  done = subprocess.run(command, cwd=_ROOT, env={**os.environ, 'BASH_COMPAT': version}, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  job_set = yaml.safe_load(done.stdout)
  [job] = job_set['spec']['replicatedJobs']
  pod = job['template']['spec']['template']['spec']
  assert pod['containers'][0]['args'] == [*_ARGUMENTS, '--distributed=auto']
  assert (job_set['metadata']['name'], pod['containers'][0]['image']) == ('base', 'i:1')
  assert pod['volumes'][0]['persistentVolumeClaim'] == {'claimName': 'n&s'}
