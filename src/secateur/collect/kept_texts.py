"""Texts that models have written for their own calibration, kept between runs by the digest of the model."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from secateur.calibration.own_text import Written
from secateur.files.cache import cache_folder, keep_json
from secateur.files.checkpoint import tensor_digest
from secateur.files.digest import model_digest
from secateur.files.reading import read_json
from secateur.models.opening.opened import OpenedModel

REVISION = 1  # of how texts are written; raise it when the same key leads to other texts


@dataclass(frozen=True)
class Record:
    """Texts of a model: what was asked for (`key`), what came of it, when (UTC) and with which versions."""

    key: dict[str, Any]
    texts: list[list[int]]
    chat: bool
    ends: list[int]
    facts: dict[str, Any]
    created: str
    versions: dict[str, str]

    @property
    def written(self) -> Written:
        """The texts."""
        return Written(self.texts, self.chat, self.ends, self.facts)


class KeptTexts:
    """The texts of one model in the folder of what is kept between runs: one file each, which appears whole.

    The model is hashed when a file is looked for, and only then.
    """

    def __init__(self, opened: OpenedModel) -> None:
        self._opened = opened
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """Of the model's files; of a module in memory, of its tensors and its configuration."""
        if self._digest is None:
            origin, source = self._opened.origin, self._opened.skeleton.source
            if origin["kind"] == "checkpoint":
                self._digest = model_digest(getattr(source, "folder"))  # noqa: B009 - not every source has one
            elif origin["kind"] == "gguf":
                self._digest = str(origin["sha256"])
            else:
                own = {name: tensor_digest(source.read([name])[name]) for name in source.names}
                facts = json.dumps([own, self._opened.facts], sort_keys=True)
                self._digest = hashlib.sha256(facts.encode()).hexdigest()
        return self._digest

    def find(self, key: Mapping[str, Any]) -> Record | None:
        """The texts of that key, written with the same versions of everything, or None.

        Raises `CheckpointError` for a damaged file.
        """
        if not any(self._folder.glob(f"*/{self._name(key)}")):  # of any model: hashing this one can take long
            return None
        file = self._file(key)
        if not file.exists():
            return None
        record: Record = read_json(file, Record, advice="It holds no kept texts, or is damaged: remove it.")
        return record if record.versions == _versions() else None

    def add(self, key: Mapping[str, Any], written: Written) -> None:
        """Keep texts. Raises `CheckpointError` where they cannot be written."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        texts = [list(ids) for ids in written.texts]
        record = Record(dict(key), texts, written.chat, list(written.ends), dict(written.facts), created, _versions())
        keep_json(self._file(key), asdict(record), "the text")

    @contextmanager
    def locked(self, key: Mapping[str, Any]) -> Iterator[None]:
        """One process at a time writes the texts of a key: the others of a run wait, and find them."""
        with ExitStack() as stack:
            try:
                self._file(key).parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self._file(key).with_suffix(".lock")))
            except (OSError, NotImplementedError):  # where nothing can be kept, each writes its own
                pass
            yield

    @property
    def _folder(self) -> Path:
        return cache_folder() / "texts"

    @staticmethod
    def _name(key: Mapping[str, Any]) -> str:
        return f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self._folder / self.digest / self._name(key)


def _versions() -> dict[str, str]:
    return {"texts": str(REVISION)} | {name: version(name) for name in ("torch", "transformers")}
