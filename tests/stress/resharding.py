"""A run continued on other numbers of devices and processes: batches and losses must equal those of one device.

Every process records the rows of every step (recorded_batches.py). Their union must equal the rows of a run on one
device, and the losses must be within 1e-5. Some legs are repeated with a stop halfway: on the same devices this must
not change a bit.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from tests.helpers.processes import ROOT, free_address
from tests.stress import recorded_batches, resharding_config
from tests.stress import trainer as trainer_lib
from tests.stress.trainer import metric_lines
from uni_moe_jax.train.workdir import saved_step
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED

TOLERANCE = 1e-5  # of a loss
_TIMEOUT = 900.0  # seconds of one leg, in which every process compiles

# step -> (tasks according to the processes, hashes of the rows), both sorted
Rows = dict[int, tuple[list[str], list[str]]]


@dataclasses.dataclass(frozen=True)
class Topology:
  """`processes` processes with `devices` devices each."""
  processes: int
  devices: int

  def __str__(self) -> str:
    return f'{self.processes} × {self.devices}'


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The runs and their legs.

  Attributes:
    runs: argument of resharding_config.py -> steps per leg, enough that each leg has every task.
    topologies: of the legs.
    repeated: topologies whose legs are repeated with a stop halfway; not the first leg.
  """
  runs: Mapping[str, int]
  topologies: tuple[Topology, ...]
  repeated: tuple[Topology, ...]


_MANY = (Topology(1, 2), Topology(1, 4), Topology(1, 8), Topology(2, 4))
FULL = Schedule({'all_tasks': 4, 'one_task': 40}, (Topology(1, 1), *_MANY, Topology(1, 1)), _MANY)
SHORT = Schedule({'all_tasks,book': 4}, (Topology(1, 1), Topology(1, 2), Topology(2, 1)), ())


class UnexpectedEnd(Exception):
  """A leg ended with another exit code or at another step than planned."""


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a schedule.

  Attributes:
    folder: has the output of `resharding_config.prepare` in 'data'; also for work directories, logs and compiled
      programs.
    arg: of resharding_config.py.
  """
  folder: pathlib.Path
  arg: str
  schedule: Schedule

  @property
  def leg_steps(self) -> int:
    return self.schedule.runs[self.arg]

  @property
  def steps(self) -> int:
    return self.leg_steps * len(self.schedule.topologies)

  def train(self, name: str, topology: Topology, until: int, fault: str = '') -> pathlib.Path:
    """Continue the run `name` until a step. Return its work directory. Raises UnexpectedEnd."""
    workdir, address = self.workdir(name), free_address()
    workdir.mkdir(parents=True, exist_ok=True)
    environment = trainer_lib.environment(self.folder)
    environment['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={topology.devices}'
    processes = []
    for i in range(topology.processes):
      command = [sys.executable, '-m', 'tests.stress.recorded_batches', str(workdir / f'rows{i}.jsonl'), str(until),
                 fault, str(ROOT / 'launch/train.py'),
                 f'--config={ROOT / "tests/stress/resharding_config.py"}:{self.arg}',
                 f'--workdir={workdir}', f'--config.data.dir={self.folder / "data"}',
                 f'--config.train.steps={self.steps}']
      if topology.processes > 1:
        command += trainer_lib.distributed_flags(address, topology.processes, i)
      processes.append(trainer_lib.start(command, workdir / f'log{i}.txt', environment))
    codes = _wait(processes)
    if set(codes) != {FINISHED if until == self.steps else PREEMPTED} or saved_step(workdir) != until:
      outputs = '; '.join(log.read_text(errors='replace')[-300:] for log in sorted(workdir.glob('log*.txt')))
      raise UnexpectedEnd(f'{workdir.name} on {topology}, to step {until}: exit codes {codes}, '
                          f'step {saved_step(workdir)}: {outputs}')
    return workdir

  def workdir(self, name: str) -> pathlib.Path:
    return self.folder / f'{self.arg.replace(",", "_")}_{name}'

  def copy(self, name: str, to: str) -> None:
    """Copy a run in its present state."""
    trainer_lib.clear(self.workdir(to))
    shutil.copytree(self.workdir(name), self.workdir(to))


@dataclasses.dataclass
class Result:
  """Lines to print, and findings."""
  report: list[str] = dataclasses.field(default_factory=list)
  findings: list[str] = dataclasses.field(default_factory=list)


def reshard(schedule: Schedule, folder: pathlib.Path) -> Result:
  """Run a schedule, two runs at a time, and check them; faults are injected into the first run."""
  trainer_lib.clear(folder)
  (folder / 'data').mkdir(parents=True)
  resharding_config.prepare(folder / 'data')
  result = Result()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    runs = [Run(folder, arg, schedule) for arg in schedule.runs]
    for one in pool.map(_reshard_one, runs, [tuple(recorded_batches.FAULTS), *[()] * (len(runs) - 1)]):
      result.report += one.report
      result.findings += one.findings
  return result


def _reshard_one(run: Run, faults: Sequence[str]) -> Result:
  result = Result()
  try:
    reference = run.train('reference', Topology(1, 1), run.steps)
    for i, topology in enumerate(run.schedule.topologies):
      run.train('resharded', topology, run.leg_steps * (i + 1))
      run.copy('resharded', f'leg{i}')
    resharded = run.workdir('resharded')
    num_rows = sum(len(rows) for _, rows in read_rows(reference).values())
    result.report.append(f'{run.arg}: {run.steps} steps, {num_rows} rows')
    _check(run, read_rows(resharded), metric_lines(resharded), result)
    _repeat(run, result)
    _inject(run, faults, result)
  except UnexpectedEnd as e:
    result.findings.append(f'{run.arg}: {e}')
  return result


def _check(run: Run, rows: Rows, lines: list[dict], result: Result) -> None:
  """Compare rows and losses of every leg with those of one device. Each leg must contain every task."""
  reference = run.workdir('reference')
  differences = row_differences(read_rows(reference), rows)
  distances = loss_differences(metric_lines(reference), lines)
  all_tasks = set().union(*(tasks for tasks, _ in rows.values()))
  for i, topology in enumerate(run.schedule.topologies):
    steps = range(run.leg_steps * i + 1, run.leg_steps * (i + 1) + 1)
    worst = max(steps, key=lambda step: distances.get(step, 0.))
    wrong = [f'step {step}: {differences[step]}' for step in steps if step in differences]
    if distances.get(worst, 0.) > TOLERANCE:
      wrong.append(f'step {worst}: a loss differs by {distances[worst]:.2g} from that of one device')
    if missing := all_tasks - set().union(*(rows.get(step, ((), ()))[0] for step in steps)):
      wrong.append(f'steps {steps[0]}…{steps[-1]}: none is of {", ".join(sorted(missing))}')
    result.report.append(f'  {topology}: steps {steps[0]}…{steps[-1]}, losses within {distances.get(worst, 0.):.2g} '
                         'of those of one device')
    result.findings += [f'{run.arg} on {topology}, {w}' for w in wrong]


def _repeat(run: Run, result: Result) -> None:
  """Repeat legs from their start with a stop halfway: state and log must be bit for bit the same."""
  for i, topology in enumerate(run.schedule.topologies):
    if i == 0 or topology not in run.schedule.repeated:
      continue
    run.copy(f'leg{i - 1}', f'repeated{i}')
    run.train(f'repeated{i}', topology, run.leg_steps * i + run.leg_steps // 2)
    repeated = run.train(f'repeated{i}', topology, run.leg_steps * (i + 1))
    result.findings += [f'stopped and continued on {topology}: {d}'
                        for d in trainer_lib.differences(run.workdir(f'leg{i}'), repeated)]
    result.report.append(f'  {topology}: repeated with a stop halfway')


def _inject(run: Run, faults: Sequence[str], result: Result) -> None:
  """Repeat the second leg with faults that must be detected."""
  topology, end = run.schedule.topologies[1], 2 * run.leg_steps
  for fault in faults:
    _, words = recorded_batches.FAULTS[fault]
    run.copy('leg0', fault)
    faulty = run.train(fault, topology, end, fault)
    findings = [*row_differences(read_rows(run.workdir('leg1')), read_rows(faulty)).values(),
                *trainer_lib.differences(run.workdir('leg1'), faulty)]
    detected = next((f for f in findings if words in f), '')
    outcome = f'detected: {detected}' if detected else 'MISSED'
    result.report.append(f'  injected fault {fault!r} on {topology}: {outcome}')
    if not detected:
      result.findings.append(f'{run.arg}: injected fault {fault!r} was missed')


def read_rows(workdir: pathlib.Path) -> Rows:
  """Return what all processes of a run recorded, joined per step."""
  tasks, hashes = {}, {}
  for path in sorted(workdir.glob('rows*.jsonl')):
    for line in map(json.loads, path.read_text().splitlines()):
      tasks.setdefault(line['step'], set()).add(str(line['task']))
      hashes.setdefault(line['step'], []).extend(line['rows'])
  return {step: (sorted(tasks[step]), sorted(hashes[step])) for step in hashes}


def row_differences(reference: Rows, other: Rows) -> dict[int, str]:
  """Return {step: message} for the steps whose rows or tasks differ from the reference."""
  messages = {}
  for step, (tasks, rows) in reference.items():
    other_tasks, other_rows = other.get(step, ([], []))
    if other_rows != rows:
      count = len(other_rows) - sum(min(other_rows.count(r), rows.count(r)) for r in set(other_rows))
      messages[step] = f'{count} of {len(other_rows)} rows differ from those of one device, which has {len(rows)}'
    elif other_tasks != tasks:
      messages[step] = f'tasks {other_tasks} instead of {tasks}'
  return messages | {step: 'is no step of one device' for step in other if step not in reference}


def loss_differences(reference: list[dict], other: list[dict]) -> dict[int, float]:
  """Return {step: largest difference of a loss}; infinite if only one of the two logs has it."""
  def losses(lines):
    return {line['step']: {k: v for k, v in line.items() if k.startswith('loss/')} for line in lines}
  a, b = losses(reference), losses(other)
  return {step: max(abs(a[step][k] - b[step][k]) for k in a[step])
          if a.get(step) and a[step].keys() == b.get(step, {}).keys() else float('inf') for step in a.keys() | b.keys()}


def _wait(processes: Sequence[subprocess.Popen]) -> list[int]:
  """Return exit codes. Once one process has failed or the time is up, kill the others, which would wait for it."""
  end = time.monotonic() + _TIMEOUT
  while any(p.poll() is None for p in processes):
    if time.monotonic() > end or any(p.poll() not in (None, FINISHED, PREEMPTED) for p in processes):
      for p in processes:
        p.kill()
    time.sleep(.05)
  return [p.returncode for p in processes]
