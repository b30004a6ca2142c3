"""A record as it may be published: no folders of the machine where it was made, and the names that the hub knows.

The last part of a path is the name that somebody gave to a file, and stays. What stands before it says where it lay,
often under somebody's name, and goes.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from secateur.record.manifest import Manifest

# What is no path although it has slashes: an address, and a data set of the hub.
_NO_PATH = r"\b[a-z]{2,}://\S+|\bhf:(?![/.~])[\w.-]+/[\w.-]+"
_START = r"(?:file:/{0,2}|~[\w.-]*(?=[\\/])|\.{1,2}(?=[\\/])|(?<![A-Za-z0-9])[A-Za-z]:(?=[\\/]))"
_FOLDERS = r"(?:[^\\/:=*,;\"'<>|]*[\\/])"
# All folders before a name, in an argument or an entry that is a path; and those of absolute paths in a sentence.
_ANY = re.compile(rf"(?P<kept>{_NO_PATH})|{_START}?{_FOLDERS}+")
_ABSOLUTE = re.compile(rf"(?P<kept>{_NO_PATH})|(?<![\w.)/\\-]){_START}?[\\/](?:[^\s\\/:=*,;\"'<>|]+[\\/])*(?=\w)")
_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Entries that may be paths of files, except in what comes from the hub; and the parts of a manifest that have such.
_PATHS = ("path", "file", "corpus", "name", "data", "output", "base_model_name_or_path")
_PARTS = ("command", "source", "settings", "calibration", "recovery", "skipped", "left_out")


def base_model(source: Mapping[str, Any]) -> str | None:
    """The hub id of the model that was pruned, where it is known: never a path."""
    path = str(source.get("path") or "")
    name = hub_id(path)
    return name if name is not None and (name != path or not Path(name).exists()) else None


def base_of(manifest: Manifest) -> str | None:
    """The hub id of the model that a manifest is about, where it is known."""
    return str(manifest.source["path"]) if manifest.published_from else base_model(manifest.source)


def hub_id(name: str) -> str | None:
    """The id that the hub would know a model by, of a name or of a path in the hub's cache."""
    cached = _CACHED.search(name)
    name = cached[1].replace("--", "/") if cached else name
    return name if _HUB_ID.fullmatch(name) else None


def published(manifest: Manifest, base: str) -> Manifest:
    """The manifest without folders of this machine, of a model that the hub knows as `base`.

    Its digest is another one; `published_from` is that of the manifest before, which adapters may have been trained on.
    """
    made = deepcopy(manifest)
    source = str(manifest.source.get("path") or "")
    for part in _PARTS:
        setattr(made, part, _plain(getattr(made, part), source, base))
    made.source["path"] = base
    made.published_from = manifest.published_from or manifest.digest
    return made


def published_command(command: Sequence[str], source: Mapping[str, Any], base: str | None = None) -> list[str]:
    """A command line without folders of this machine, its model under the name that the hub knows."""
    return _command(command, str(source.get("path") or ""), base or base_model(source))


def last_part(path: str) -> str:
    """What a file or folder is called, whichever system its path is of."""
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def _plain(value: Any, source: str, base: str | None) -> Any:
    """A value of a manifest, with everything in it."""
    if isinstance(value, str):
        return _name(value, source, base) or _ABSOLUTE.sub(_kept, value)
    if isinstance(value, list | tuple):
        return [_plain(item, source, base) for item in value]
    if not isinstance(value, dict):
        return value
    of_hub = "repository" in value or "dataset" in value
    made: dict[str, Any] = {}
    for key, item in value.items():
        if key == "command" and isinstance(item, list):
            made[key] = _command(item, source, base)
        elif key in _PATHS and isinstance(item, str) and not of_hub:
            made[key] = _argument(item, source, base)
        else:
            made[key] = _plain(item, source, base)
    return made


def _command(command: Sequence[Any], source: str, base: str | None) -> list[str]:
    made: list[str] = []
    for word in map(str, command):
        # An output may be called like the model.
        model = "" if made and made[-1] in ("-o", "--output") else source
        made.append(_argument(word, model, base))
    return made


def _argument(word: str, source: str, base: str | None) -> str:
    """An argument of a command, or an entry that may be a path."""
    known = _name(word, source, base)
    if known is not None:
        return known
    if base and last_part(source) == last_part(word) and last_part(word):
        return base
    return _ANY.sub(_kept, word.rstrip("/\\") or word)


def _name(text: str, source: str, base: str | None) -> str | None:
    """The public name of a model, where a text is nothing but its name here."""
    if text in (source, base) and base:
        return base
    return hub_id(text) if _CACHED.search(text) else None


def _kept(match: re.Match[str]) -> str:
    return match["kept"] or ""
