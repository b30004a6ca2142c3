"""Fixtures of this folder's tests."""

# ruff: noqa: F401 - pytest finds them by name

from full_autograd import file, ids, llama
