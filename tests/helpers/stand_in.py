"""What scripts that stand in for launch scripts share: how they end, as tests want it."""

# Source of a part of a script, in which `root` is a folder and `name` that of the script. The file `name` in the folder
# holds what it `does`: its exit code, or 'wait': until a signal comes, and then to end as training does when it is
# preempted; a signal that comes twice is told by the exit code.
ENDS = '''
does = (root / name).read_text() if (root / name).exists() else '0'
if does == 'wait':
  received = []
  signal.signal(signal.SIGINT, lambda *_: received.append(1))
  (root / 'started').touch()
  end = time.monotonic() + 20
  while not received and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(0.2)
  sys.exit(75 if received == [1] else 1)
'''
