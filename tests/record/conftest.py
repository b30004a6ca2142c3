"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from verified_runs import _one_thread, dense, kept, pruned
