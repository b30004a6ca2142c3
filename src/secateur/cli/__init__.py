"""The command line: strings to objects, printing, exit codes."""

from secateur.cli.app import app, main
from secateur.cli.options import METHOD_NAMES

__all__ = ["METHOD_NAMES", "app", "main"]
