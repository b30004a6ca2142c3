"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from task_files import some_tasks
