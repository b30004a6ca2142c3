"""The command line: strings to objects, printing, exit codes."""

from secateur.cli import pruning, sweeping, recovery, packing, evaluation, reporting  # noqa: F401, I001 - they register their commands, in this order
from secateur.cli.app import app, main

__all__ = ["app", "main"]
