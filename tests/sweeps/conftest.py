"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from sweep_runs import finished, place, run
from task_files import some_tasks
