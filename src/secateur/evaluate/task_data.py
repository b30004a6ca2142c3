"""Local files in the place of the data sets that lm-evaluation-harness downloads: the same tasks, other rows.

Every task that is asked for gets a configuration that includes the harness's own and names a local file as its data
set, so that prompts, answers and metrics stay the harness's.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml

from secateur.errors import CalibrationError
from secateur.files.checkpoint import file_digest
from secateur.files.reading import json_lines, open_regular

SPLITS = ("train", "validation", "dev", "test")
SUBJECT: Literal["subject"] = "subject"  # the column of a file that serves several tasks


@contextmanager
def reading_quietly() -> Iterator[None]:
    """Without a bar for every file, and without the call home by which `datasets` counts each use of its readers."""
    import datasets

    counts, bars = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, not datasets.are_progress_bars_disabled()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()


class _Row(TypedDict):
    subject: str | int


class LocalData:
    """A folder of JSON lines files that serve tasks.

    A file is called TASK_SPLIT or TASK.SPLIT, SPLIT being train, validation, dev or test, then anything, then .jsonl.
    One called as the tasks of a family begin (mmlu for mmlu_anatomy) serves each of them with the rows whose column
    `subject` is the task's subset.
    `written` is a temporary folder for configurations.
    """

    def __init__(self, folder: Path, written: Path, index: Mapping[str, Any]) -> None:
        if not folder.is_dir():
            raise CalibrationError(f"--task-data {folder}: no such folder.")
        self.folder, self.written, self.index = folder, written, index
        self.files = sorted(file for file in folder.iterdir() if file.suffix == ".jsonl")
        self._by_subject: dict[Path, dict[str, Path]] = {}

    def configure(self, name: str, shots: int | None) -> str:
        """Write the configurations of a task, or of a group and all that is in it; returns a digest of the files used.

        Raises `CalibrationError` when a task has no file, or none to draw its examples from.
        """
        used: set[tuple[str, str, Path]] = set()
        self._configure(name, shots, used)
        for _, _, file in sorted(used):
            open_regular(file, error=CalibrationError).close()
        digests = {file: file_digest(file) for _, _, file in used}
        listing = sorted(f"{task} {split} {digests[file]}" for task, split, file in used)
        return hashlib.sha256("\n".join(listing).encode()).hexdigest()

    def _configure(self, name: str, shots: int | None, used: set[tuple[str, str, Path]]) -> None:
        """As `configure`; which file serves which split of which task goes into `used`."""
        entry = self.index.get(name)
        if entry is None:
            raise CalibrationError(f"{name}: a task that only its group's own file describes takes no local data.")
        kind = entry.kind.name
        if kind == "GROUP":
            self._write(name, {"include": str(entry.yaml_path), "group": name})
        if kind in ("GROUP", "TAG"):
            listed = entry.cfg["task"] if kind == "GROUP" else sorted(entry.tags)
            for member in listed if isinstance(listed, list) else [listed]:
                name = member if isinstance(member, str) else member.get("task") or member["group"]
                self._configure(name, shots, used)
            return
        if kind != "TASK":
            raise CalibrationError(f"{name}: a task with code of its own, which takes no local data. Leave it out.")
        splits, origins = self._splits(name, entry.cfg)
        used |= {(name, split, file) for split, file in origins.items()}
        evaluated = self._evaluated(name, entry.cfg, splits)
        own = entry.cfg.get("num_fewshot")
        asked = own or 0 if shots is None or own == 0 else shots
        sources = [entry.cfg.get(f"{role}_split") for role in ("fewshot", "training", "validation")]
        supplied = "samples" in (entry.cfg.get("fewshot_config") or {})
        if asked and not supplied and not any(source in splits for source in sources if source != evaluated):
            expected = next((source for source in sources if source and source != evaluated), "train")
            raise CalibrationError(
                f"{name}: {asked} shots need examples, and {self.folder} has none for it. Add {name}_{expected}.jsonl, "
                f"or use --shots 0; found {self._found()}."
            )
        # The harness's own, with other data; a role whose split has no file is left out.
        roles = [f"{role}_split" for role in ("training", "validation", "test", "fewshot")]
        files = {split: str(file.absolute()) for split, file in splits.items()}
        configuration = {
            "include": str(entry.yaml_path),
            "task": entry.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(self.written / "arrow")},
            "custom_dataset": None,
            **{role: split if (split := entry.cfg.get(role)) in splits else None for role in roles},
        }
        self._write(name, configuration)

    def _splits(self, name: str, config: Mapping[str, Any]) -> tuple[dict[str, Path], dict[str, Path]]:
        """(file of each split for a task, the file that the user gave for it): its own, or those of its family."""
        own = self._named(name)
        if own:
            return own, dict(own)
        subject = str(config.get("dataset_name"))
        words = name.split("_")
        for count in range(len(words) - 1, 0, -1):
            shared = self._named("_".join(words[:count]))
            splits = {
                split: parts[subject] for split, file in shared.items() if subject in (parts := self._parts(file))
            }
            if splits:
                return splits, {split: shared[split] for split in splits}
        raise CalibrationError(
            f"{name}: no file for it in {self.folder}. Expected {name}_SPLIT*.jsonl, SPLIT being one of "
            f"{', '.join(SPLITS)}; found {self._found()}."
        )

    def _named(self, name: str) -> dict[str, Path]:
        splits: dict[str, Path] = {}
        pattern = re.compile(rf"{re.escape(name)}[_.]({'|'.join(SPLITS)})(?![A-Za-z]).*")
        for file in self.files:
            if match := pattern.fullmatch(file.stem):
                if match[1] in splits:
                    raise CalibrationError(
                        f"{name}: {splits[match[1]].name} and {file.name} in {self.folder} are both its {match[1]} "
                        "split. Keep one of them there."
                    )
                splits[match[1]] = file
        return splits

    def _parts(self, file: Path) -> dict[str, Path]:
        """The rows of a file by subject, each in a file of its own."""
        if file not in self._by_subject:
            rows: dict[str, list[bytes]] = {}
            advice = f'Expected a JSON object with a "{SUBJECT}", which tells the tasks that the file serves apart.'
            for row, line in json_lines(file, _Row, error=CalibrationError, advice=advice):
                rows.setdefault(str(row[SUBJECT]), []).append(line.rstrip(b"\r\n") + b"\n")
            folder = self.written / f"{file.stem}-by-subject"
            folder.mkdir()
            self._by_subject[file] = {subject: folder / f"{number}.jsonl" for number, subject in enumerate(rows)}
            for subject, part in self._by_subject[file].items():
                part.write_bytes(b"".join(rows[subject]))
        return self._by_subject[file]

    def _evaluated(self, name: str, config: Mapping[str, Any], splits: dict[str, Path]) -> str:
        """The split that the harness evaluates. A dev file is the validation split of a task that has no other dev."""
        split = config.get("test_split") or config.get("validation_split")
        if split == "validation" and split not in splits and "dev" in splits and config.get("fewshot_split") != "dev":
            splits[split] = splits.pop("dev")
        if split not in splits:
            raise CalibrationError(
                f"{name}: no {split} split in {self.folder}, which is what the harness evaluates it on. Expected "
                f"{name}_{split}*.jsonl; found {self._found()}."
            )
        return str(split)

    def _found(self) -> str:
        return ", ".join(file.name for file in self.files) or "no .jsonl file at all"

    def _write(self, name: str, configuration: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(configuration), sort_keys=False)
        (self.written / f"{name}.yaml").write_text(text, encoding="utf-8")
