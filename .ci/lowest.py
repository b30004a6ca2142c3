"""Print the lower bounds of pyproject.toml as exact versions: the constraints of `make test-lowest`."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What `dev` adds only tests and checks the code; its versions are nobody's bounds.
groups = [own for name, own in project["optional-dependencies"].items() if name not in ("all", "dev")]
for requirement in sorted({*project["dependencies"], *(requirement for group in groups for requirement in group)}):
    if match := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
        print("==".join(match.groups()))
    else:
        sys.exit(f"{requirement}: no lower bound of the form NAME>=VERSION")
