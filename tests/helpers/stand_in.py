"""Source code that stand-ins for launch scripts share."""

# End of a script `name` in the folder `root`. The file `name` there has an exit code, or 'wait': wait for a signal and
# exit like preempted training. The exit code shows whether exactly one signal came.
ENDS = '''
action = (root / name).read_text() if (root / name).exists() else '0'
if action == 'wait':
  received = []
  signal.signal(signal.SIGINT, lambda *_: received.append(1))
  (root / 'started').touch()
  end = time.monotonic() + 20
  while not received and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(0.2)
  sys.exit(75 if received == [1] else 1)
'''
