"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from command_line import call
from sweep_runs import finished, place, run
from task_files import some_tasks
