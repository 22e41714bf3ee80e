"""What commands answer to the shell. README.md says what each means to a person."""

FINISHED = 0
ERROR = 1
USAGE = 2
PREEMPTED = 75  # stopped by a signal, and saved: the same command continues
