"""The folder of a checkpoint: a local one or the hub's copy in its cache, and the files beside the weights."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, INDEX_FILE, MODELOPT_FILE, PACKED_FILE, PACKED_INDEX
from secateur.files.reading import check_inside, open_regular
from secateur.files.writer import writing

OTHER_FOLDERS = ("original", "onnx", "openvino", "coreml", "report")  # of other formats and tools
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
DOWNLOADED = ("*LICENSE*", "*LICENCE*", "NOTICE*", "USE_POLICY*")
DOWNLOADED_SUFFIXES = (
    *(".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken"),
    *(".spm", ".vocab", ".bpe", ".yaml", ".yml", ".py"),
)


def locate(source: str, revision: str | None = None, *, whole: bool = False) -> Path:
    """The local folder of a checkpoint: the folder itself, or the hub's snapshot in huggingface_hub's cache.

    A snapshot is `whole`, or has what a model is made of and no weights in other formats.

    Raises `CheckpointError` when it is neither, or when the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder}: give the folder of the checkpoint, not one of its files.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*(f"*{ending}" for ending in DOWNLOADED_SUFFIXES), *DOWNLOADED, CARD_FILE]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                source,
                revision=revision,
                allow_patterns=None if whole else wanted,
                ignore_patterns=None if whole else ["original/*", "onnx/*", "consolidated*"],
            )
        )
    except HFValidationError:
        raise CheckpointError(f"{source}: no such folder, and not a hub id (owner/name) either.") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has no copy in "
            "the cache. Give a local folder, or download it first: hf download " + source
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{source}: no such folder, and the hub says: {error}") from None


def companions(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a checkpoint that go with its weights, also those in subfolders, and the names of what else it has.

    The first are configuration, tokenizer, templates, licence, code. The others are weights of all formats, whole
    subfolders (their names end in a slash) and links to folders. What tools leave there for themselves (git, caches)
    is no part of a model, and a model card is written anew.

    Raises `CheckpointError` for a companion that is a link out of the folder.
    """
    copied: list[Path] = []
    left: list[str] = []
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if name.startswith((".git", ".cache", ".DS_Store", ".ipynb_checkpoints")) or name == "__pycache__":
            continue
        if name in (CARD_FILE, "secateur.json", INDEX_FILE, MODELOPT_FILE, PACKED_FILE, PACKED_INDEX):
            continue
        if not entry.is_dir():
            if _is_companion(entry):
                copied.append(entry)
            else:
                left.append(name)
            continue
        inside = [path for path in sorted(entry.rglob("*")) if path.is_symlink() or not path.is_dir()]
        inside = [path for path in inside if "__pycache__" not in path.parts]
        if entry.is_symlink() or name in OTHER_FOLDERS or not all(map(_is_companion, inside)):
            left.append(f"{name}/")
        else:
            copied += inside
    for file in copied:
        check_inside(file, folder)
    return copied, left


def copy_files(folder: Path, files: Iterable[Path], target: Path) -> None:
    """Copy files of a folder to the same places in another. Raises `CheckpointError` for what is no regular file."""
    for file in files:
        place = target / file.relative_to(folder)
        with open_regular(file) as original, writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as copy:
                shutil.copyfileobj(original, copy)


def _is_companion(file: Path) -> bool:
    return (
        file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(WEIGHT_SUFFIXES)
        and file.stat().st_size < 1 << 28
    )
