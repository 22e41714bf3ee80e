"""Exit codes of the commands. The documentation explains them to users."""

FINISHED = 0
ERROR = 1
USAGE = 2
PREEMPTED = 75  # stopped by a signal after saving: the same command continues
