"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from command_line import call
from hub_server import hub
