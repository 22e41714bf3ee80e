"""A run moved at checkpoints to other numbers of devices and processes: the batches and losses stay those of one device.

Every step's rows are written down by every process (recorded.py); joined, they must be those of a run that stays on one device,
and its losses must be within 1e-5. Some legs are taken again with a stop in their middle: on the same devices that changes no bit.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from uni_moe_jax.faults import kills, moved_run, recorded
from uni_moe_jax.train.workdir import saved_step
from uni_moe_jax.utils.exit_codes import FINISHED, PREEMPTED

MOST = 1e-5  # that a loss may differ
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LONGEST = 900.0  # seconds of one leg, in which every process compiles

# step -> (tasks that its processes name, hashes of its rows), both sorted
Rows = dict[int, tuple[list[str], list[str]]]


@dataclasses.dataclass(frozen=True)
class Place:
  """So many processes, of so many devices each."""
  processes: int
  devices: int

  def __str__(self) -> str:
    return f'{self.processes} × {self.devices}'


@dataclasses.dataclass(frozen=True)
class Journey:
  """What is moved, and where to.

  Attributes:
    settings: arguments of moved_run.py's config: each is a run; and the steps of its legs, enough that each has every task.
    route: a leg on each place.
    again: places whose legs are taken again, with a stop in the middle; not the first leg.
  """
  settings: Mapping[str, int]
  route: tuple[Place, ...]
  again: tuple[Place, ...]


FULL = Journey({'all_tasks': 4, 'one_task': 40}, (Place(1, 1), Place(1, 2), Place(1, 4), Place(1, 8), Place(2, 4), Place(1, 1)),
               (Place(1, 2), Place(1, 4), Place(1, 8), Place(2, 4)))
SHORT = Journey({'mixed,book': 4}, (Place(1, 1), Place(1, 2), Place(2, 1)), ())


class Ended(Exception):
  """A leg ended otherwise than it should; says how."""


@dataclasses.dataclass(frozen=True)
class Course:
  """One of a journey's runs.

  Attributes:
    folder: with what `moved_run.prepare` makes in 'data'; of work directories, logs and compiled programs, too.
  """
  folder: pathlib.Path
  setting: str
  journey: Journey

  @property
  def leg(self) -> int:
    """Its steps on a place."""
    return self.journey.settings[self.setting]

  @property
  def steps(self) -> int:
    return self.leg * len(self.journey.route)

  def go(self, name: str, place: Place, until: int, plant: str = '') -> pathlib.Path:
    """Goes on with the run `name` on a place until a step. Returns its work directory. Raises Ended."""
    workdir, address = self.workdir(name), f'127.0.0.1:{_free_port()}'
    workdir.mkdir(parents=True, exist_ok=True)
    environment = kills.environment(self.folder)
    environment['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={place.devices}'
    processes = []
    for i in range(place.processes):
      command = [sys.executable, '-m', 'uni_moe_jax.faults.recorded', str(_rows_file(workdir, i)), str(until), plant,
                 str(_ROOT / 'launch/train.py'), f'--config={_ROOT / "uni_moe_jax/faults/moved_run.py"}:{self.setting}',
                 f'--workdir={workdir}', f'--config.data.dir={self.folder / "data"}', f'--config.train.steps={self.steps}']
      if place.processes > 1:
        command += [f'--coordinator_address={address}', f'--num_processes={place.processes}', f'--process_id={i}']
      with _log(workdir, i).open('ab') as log:
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment))
    codes = _wait(processes)
    if set(codes) != {FINISHED if until == self.steps else PREEMPTED} or saved_step(workdir) != until:
      said = '; '.join(_log(workdir, i).read_text(errors='replace')[-300:] for i in range(place.processes))
      raise Ended(f'{workdir.name} on {place}, to step {until}: exit codes {codes}, step {saved_step(workdir)}: {said}')
    return workdir

  def workdir(self, name: str) -> pathlib.Path:
    return self.folder / f'{self.setting.replace(",", "_")}_{name}'

  def copy(self, name: str, to: str) -> pathlib.Path:
    """A copy of a run, as it is now."""
    shutil.rmtree(self.workdir(to), ignore_errors=True)
    return pathlib.Path(shutil.copytree(self.workdir(name), self.workdir(to)))


@dataclasses.dataclass
class Seen:
  """What a course came to: lines to print, and findings."""
  said: list[str] = dataclasses.field(default_factory=list)
  findings: list[str] = dataclasses.field(default_factory=list)


def travel(journey: Journey, folder: pathlib.Path) -> Seen:
  """Moves the runs of a journey, two at a time, and judges them; faults are planted in the first of them."""
  shutil.rmtree(folder, ignore_errors=True)
  (folder / 'data').mkdir(parents=True)
  moved_run.prepare(folder / 'data')
  seen = Seen()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    courses = [Course(folder, setting, journey) for setting in journey.settings]
    for found in pool.map(_take, courses, [tuple(recorded.PLANTS), *[()] * (len(courses) - 1)]):
      seen.said += found.said
      seen.findings += found.findings
  return seen


def _take(course: Course, plants: Sequence[str]) -> Seen:
  seen = Seen()
  try:
    whole = course.go('whole', Place(1, 1), course.steps)
    for i, place in enumerate(course.journey.route):
      course.go('moved', place, course.leg * (i + 1))
      course.copy('moved', f'leg{i}')
    moved = course.workdir('moved')
    seen.said.append(f'{course.setting}: {course.steps} steps, {sum(len(rows) for _, rows in read_rows(whole).values())} rows')
    _judge(course, read_rows(moved), kills.metric_lines(moved), seen)
    _take_again(course, seen)
    _plant(course, plants, seen)
  except Ended as e:
    seen.findings.append(f'{course.setting}: {e}')
  return seen


def _judge(course: Course, rows: Rows, lines: list[dict], seen: Seen) -> None:
  """Rows and losses of every leg against those of one device; a leg must have steps of every task."""
  whole = course.workdir('whole')
  other_rows, apart = rows_apart(read_rows(whole), rows), losses_apart(kills.metric_lines(whole), lines)
  for i, place in enumerate(course.journey.route):
    steps = range(course.leg * i + 1, course.leg * (i + 1) + 1)
    worst = max(steps, key=lambda step: apart.get(step, 0.))
    wrong = [f'step {step}: {other_rows[step]}' for step in steps if step in other_rows]
    if apart.get(worst, 0.) > MOST:
      wrong.append(f'step {worst}: a loss is {apart[worst]:.2g} away from that of one device')
    tasks = {step: set(rows.get(step, ((), ()))[0]) for step in rows}
    if missing := set().union(*tasks.values()) - set().union(*(tasks.get(step, set()) for step in steps)):
      wrong.append(f'steps {steps[0]}…{steps[-1]}: none is of {", ".join(sorted(missing))}')
    seen.said.append(f'  {place}: steps {steps[0]}…{steps[-1]}, losses within {apart.get(worst, 0.):.2g} of those of one device')
    seen.findings += [f'{course.setting} on {place}, {w}' for w in wrong]


def _take_again(course: Course, seen: Seen) -> None:
  """Legs from their beginning, with a stop in the middle: the state and the log must be the same, bit for bit."""
  for i, place in enumerate(course.journey.route):
    if i == 0 or place not in course.journey.again:
      continue
    course.copy(f'leg{i - 1}', f'again{i}')
    course.go(f'again{i}', place, course.leg * i + course.leg // 2)
    again = course.go(f'again{i}', place, course.leg * (i + 1))
    seen.findings += [f'stopped and gone on with on {place}: {d}' for d in kills.differences(course.workdir(f'leg{i}'), again)]
    seen.said.append(f'  {place}: taken again with a stop in the middle')


def _plant(course: Course, plants: Sequence[str], seen: Seen) -> None:
  """The first move once more, with faults in it that must be found."""
  place, end = course.journey.route[1], 2 * course.leg
  for plant in plants:
    _, sentence = recorded.PLANTS[plant]
    course.copy('leg0', plant)
    planted = course.go(plant, place, end, plant)
    found = [*rows_apart(read_rows(course.workdir('leg1')), read_rows(planted)).values(),
             *kills.differences(course.workdir('leg1'), planted)]
    said = next((f for f in found if sentence in f), '')
    seen.said.append(f'  planted fault {plant!r} on {place}: {"found: " + said if said else "NOT FOUND"}')
    if not said:
      seen.findings.append(f'{course.setting}: planted fault {plant!r} was not found')


def read_rows(workdir: pathlib.Path) -> Rows:
  """What all processes of a run wrote down, joined per step."""
  tasks, hashes = {}, {}
  for path in sorted(workdir.glob('rows*.jsonl')):
    for line in map(json.loads, path.read_text().splitlines()):
      tasks.setdefault(line['step'], set()).add(str(line['task']))
      hashes.setdefault(line['step'], []).extend(line['rows'])
  return {step: (sorted(tasks[step]), sorted(hashes[step])) for step in hashes}


def rows_apart(whole: Rows, other: Rows) -> dict[int, str]:
  """Steps whose rows are not those of the whole run → how many of them, or what else is wrong."""
  found = {}
  for step, (tasks, rows) in whole.items():
    there, theirs = other.get(step, ([], []))
    if theirs != rows:
      alien = len(theirs) - sum(min(theirs.count(r), rows.count(r)) for r in set(theirs))
      found[step] = f'{alien} of {len(theirs)} rows are not those of one device, which has {len(rows)}'
    elif there != tasks:
      found[step] = f'tasks {there} instead of {tasks}'
  return found | {step: 'is not a step of one device' for step in other if step not in whole}


def losses_apart(whole: list[dict], other: list[dict]) -> dict[int, float]:
  """Step → largest difference of a loss; infinite where one of the two has it alone."""
  def losses(lines):
    return {line['step']: {k: v for k, v in line.items() if k.startswith('loss/')} for line in lines}
  found, mine, theirs = {}, losses(whole), losses(other)
  for step in mine.keys() | theirs.keys():
    a, b = mine.get(step, {}), theirs.get(step, {})
    found[step] = max(abs(a[k] - b[k]) for k in a) if a and a.keys() == b.keys() else float('inf')
  return found


def _rows_file(workdir: pathlib.Path, process: int) -> pathlib.Path:
  return workdir / f'rows{process}.jsonl'


def _log(workdir: pathlib.Path, process: int) -> pathlib.Path:
  return workdir / f'log{process}.txt'


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _wait(processes: Sequence[subprocess.Popen]) -> list[int]:
  """Exit codes; once one has failed or the time is up, the others are killed, which would wait for it."""
  end = time.monotonic() + _LONGEST
  while any(p.poll() is None for p in processes):
    if time.monotonic() > end or any(p.poll() not in (None, FINISHED, PREEMPTED) for p in processes):
      for p in processes:
        p.kill()
    time.sleep(.05)
  return [p.returncode for p in processes]
