"""The tree of errors."""

import re

from secateur import errors
from secateur.errors import SecateurError


def test_the_tree_is_as_drawn() -> None:
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r" [├└]─ (\w+) \((\w+)\)", line):
            kind, builtin = match.groups()
            assert issubclass(getattr(errors, kind), (SecateurError, __builtins__[builtin]))
            assert issubclass(getattr(errors, kind), __builtins__[builtin])
