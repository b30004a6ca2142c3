"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from command_line import call, model
from hub_server import hub
from task_files import some_tasks
