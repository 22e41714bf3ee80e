"""What the scripts do in a bash that is older than that of the tests; macOS has 3.2."""

import os
import subprocess

import pytest
import yaml

from tests.helpers.processes import ROOT

_ARGUMENTS = (r'--config=a\d"x', "--workdir=it's & $HOME", '--x=${NAME} ${ARGUMENTS}', '')


@pytest.mark.parametrize('version', ['', '4.2'])  # up to 4.2 quotes in a replacement are literal
def test_a_job_set_has_the_arguments_in_any_bash(version):
  command = ['launch/gke.sh', '--name', 'base', '--image', 'i:1', '--claim', 'n&s', '--dry_run', '--', *_ARGUMENTS]
  done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'BASH_COMPAT': version}, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  job_set = yaml.safe_load(done.stdout)
  [job] = job_set['spec']['replicatedJobs']
  pod = job['template']['spec']['template']['spec']
  assert pod['containers'][0]['args'] == [*_ARGUMENTS, '--distributed=auto']
  assert (job_set['metadata']['name'], pod['containers'][0]['image']) == ('base', 'i:1')
  assert pod['volumes'][0]['persistentVolumeClaim'] == {'claimName': 'n&s'}


def test_local_processes_need_a_bash_that_names_the_process_that_has_ended(tmp_path):
  (tmp_path / 'bash_5.0').write_text('wait() { echo "wait: -p: invalid option" >&2; return 2; }')
  environment = {**os.environ, 'UNI_MOE_PYTHON': '/bin/false', 'BASH_ENV': str(tmp_path / 'bash_5.0')}
  command = ['launch/local_processes.sh', '--port', '7733', '--', '--config=c.py']
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
  assert (done.returncode, done.stdout) == (2, '')
  assert 'is too old; install bash 5.1 or newer' in done.stderr and done.stderr.count('\n') == 1
