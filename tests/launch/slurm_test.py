"""slurm.sbatch: cancelled jobs, job arrays, processors and dry runs, with stand-ins for Slurm's commands."""

import os
import pathlib
import subprocess

import pytest

from tests.helpers import stand_in
from tests.helpers.processes import ROOT

_JOB = ['bash', str(ROOT / 'launch/slurm.sbatch'), 'a']
# What `scontrol show job --oneliner` of Slurm 24.11 prints about a job that has received a signal.
_SHOWN = 'JobId=17 JobName=a b {} Requeue=1 Restarts=0 PreemptEligibleTime=2026-12-01T16:36:07 {} SuspendTime=None'
# Training that saves when scancel signals it.
_SRUN = '''trap 'exit 75' USR1
echo "$$" >new && mv new pid
while :; do sleep 0.05; done'''


def _environment(folder: pathlib.Path) -> dict[str, str]:
  return dict(PATH=f'{folder}:{os.environ["PATH"]}', SLURM_SUBMIT_DIR=str(folder), SLURM_JOB_ID='17')


@pytest.fixture(name='slurm')
def _slurm(tmp_path):
  """Run the job, signal its shell as Slurm does, and return the process and what scancel and scontrol got."""

  def run(shown: str, **variables: str):
    stand_in.write_program(tmp_path / 'srun', _SRUN)
    stand_in.write_program(tmp_path / 'scancel', 'echo "$*" >>commands', 'kill -USR1 "$(cat pid)"')
    stand_in.write_program(tmp_path / 'scontrol', f'if [[ $1 == show ]]; then echo "{shown}"; exit; fi',
                           'echo "$*" >>commands')
    job = subprocess.Popen(_JOB, env={**_environment(tmp_path), **variables}, stderr=subprocess.PIPE, text=True)
    stand_in.wait_for(tmp_path / 'pid')
    job.terminate()
    errors = job.communicate(timeout=20)[1]
    return job.returncode, errors, (tmp_path / 'commands').read_text().splitlines()
  return run


@pytest.mark.parametrize('state', ['COMPLETING', 'CANCELLED'])
def test_a_cancelled_job_saves_and_is_not_requeued(slurm, state):
  code, errors, commands = slurm(_SHOWN.format(f'JobState={state} Reason=None', 'PreemptTime=None'))
  assert (code, commands) == (75, ['--signal=TERM 17'])
  assert errors == 'slurm.sbatch: the job was cancelled and is not requeued; the same command continues.\n'


@pytest.mark.parametrize('shown', [
    _SHOWN.format('JobState=RUNNING Reason=None', 'PreemptTime=None'),  # minutes before the time limit
    _SHOWN.format('JobState=RUNNING Reason=None', 'PreemptTime=2026-12-01T16:36:27'),  # the grace time of a preemption
    _SHOWN.format('JobState=COMPLETING Reason=TimeLimit', 'PreemptTime=None'),  # the time limit
    _SHOWN.format('JobState=COMPLETING Reason=None', 'PreemptTime=2026-12-01T16:36:27'),  # after the grace time
    '',  # the controller does not answer
])
def test_a_job_is_requeued_after_a_time_limit_or_a_preemption(slurm, shown):
  assert slurm(shown) == (75, '', ['--signal=TERM 17', 'requeue 17'])


def test_a_task_of_a_job_array_signals_and_requeues_itself_alone(slurm):
  # Slurm gives the array's own number, 17, to its last task.
  _, _, commands = slurm('', SLURM_ARRAY_JOB_ID='17', SLURM_ARRAY_TASK_ID='2')
  assert commands == ['--signal=TERM 17_2', 'requeue 17_2']


@pytest.mark.parametrize('folder, script', [('.', './launch/slurm.sbatch'), ('launch', './slurm.sbatch')])
def test_a_dry_run_works_in_any_folder(folder, script):
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'UNI_MOE'))}
  done = subprocess.run([script, '--dry_run', '--workdir=w'], cwd=ROOT / folder, env=environment, capture_output=True,
                        text=True)
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith('#SBATCH --job-name=uni_moe_jax\n') and 'launch/train.py --workdir=w ' in done.stdout


def test_slurms_tasks_get_the_requested_processors(tmp_path):
  stand_in.write_program(tmp_path / 'srun', 'echo "$SRUN_CPUS_PER_TASK"')
  environment = {**_environment(tmp_path), 'SLURM_CPUS_PER_TASK': '12'}
  done = subprocess.run(_JOB, env=environment, capture_output=True, text=True)
  assert done.stdout == '12\n'
