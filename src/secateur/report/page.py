"""From the contents of a report to a folder with one self-contained page and its pictures as files."""

import base64
import datetime
import hashlib
from collections.abc import Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import secateur
from secateur.errors import CheckpointError
from secateur.files.writer import writing
from secateur.runs.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER, PAGE = "report", "index.html"
WRITTEN = (".html", ".png", ".svg", ".csv")  # what reports consist of
GENERATOR = '<meta name="generator" content="Secateur'


def render(template: str, content: Mapping[str, Any]) -> str:
    """The page: a template of ours with style and script inside, everything that comes from outside escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    assets = files("secateur.report") / "assets"
    script = (assets / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("secateur.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script=script,
        # The page's own script may run, and none that a name or a figure might smuggle in.
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=secateur.__version__,
        today=datetime.date.today().isoformat(),
        **content,
    )


@contextmanager
def report_folder(parent: Path) -> "Iterator[Path]":
    """A folder to fill, which becomes `parent/report` when it is complete and replaces a report that is there.

    Raises `CheckpointError` where something else has that name, or nothing can be written.
    """
    target = parent.absolute() / FOLDER
    if target.exists() and not is_report(target):
        raise CheckpointError(
            f"{target}: exists and is no report of Secateur, so it will not be replaced. Move it out of the way."
        )
    others = [path for path in sorted(target.rglob("*")) if path.suffix not in WRITTEN and not path.is_dir()]
    if others:
        raise CheckpointError(
            f"{others[0]}: no part of a report of Secateur, and writing a new report would remove it. Move it away."
        )
    with Transaction(target, overwrite=True) as transaction, writing(target):
        yield transaction.folder
        transaction.commit()


def is_report(folder: Path) -> bool:
    """Whether a folder is empty or holds a page that Secateur wrote."""
    if not folder.is_dir():
        return False
    page = folder / PAGE
    return (
        GENERATOR in page.read_text(encoding="utf-8", errors="replace") if page.is_file() else not any(folder.iterdir())
    )
