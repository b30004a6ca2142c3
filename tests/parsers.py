"""One function for each format that Secateur parses, from the bytes of a file: the property-based tests and the fuzzers
in `fuzz/` run the same ones. They let nothing through but the errors that Secateur raises on purpose.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from secateur.calibration.documents import file_text, jsonl_texts, parquet_documents
from secateur.calibration.windows import token_file
from secateur.collect.gradient_file import GradientFile
from secateur.errors import SecateurError
from secateur.files.checkpoint import INDEX_FILE, PACKED_FILE, SINGLE_FILE, Checkpoint, read_header, read_tensor
from secateur.files.packed import PackedCheckpoint, packed_shards
from secateur.files.reading import digest_of, read_yaml
from secateur.models.opening.configuration import check_no_code, compare_with_shards, read_configuration
from secateur.models.opening.opened import load_gguf
from secateur.record.manifest import FILE_NAME
from secateur.record.verify import verify
from secateur.recover.adapters import read_adapter

EMPTY_SHARD = (2).to_bytes(8, "little") + b"{}"


def _header(file: Path) -> None:
    for record in read_header(file).tensors.values():
        read_tensor(record)


def _index(file: Path) -> None:
    (file.parent / "a.safetensors").write_bytes(EMPTY_SHARD)
    Checkpoint(file.parent)


def _sealed(file: Path) -> None:
    """Put the right digest into a record, so that what comes after the digest is reached."""
    try:
        value = json.loads(file.read_bytes())
        value["digest"] = digest_of(value)
        file.write_text(json.dumps(value, indent=1) + "\n")
    except (ValueError, TypeError, AttributeError, RecursionError):
        return


def _manifest(file: Path) -> None:
    _sealed(file)
    (file.parent / SINGLE_FILE).write_bytes(EMPTY_SHARD)
    result = verify(file.parent)
    assert result.problems or result.ok


def _verified_shard(file: Path) -> None:
    (file.parent / FILE_NAME).write_text("{}")
    verify(file.parent)


def _packed(file: Path) -> None:
    _sealed(file)
    (file.parent / packed_shards(1)[0]).write_bytes(EMPTY_SHARD)
    found = PackedCheckpoint(file.parent)
    found.read(found.names)


def _configuration(file: Path) -> None:
    found = read_configuration(file.parent)
    check_no_code(file.parent, found)
    compare_with_shards(file.parent, found, {"a.0": (4, 4)})


def _adapter(file: Path) -> None:
    (file.parent / "adapter_model.safetensors").write_bytes(EMPTY_SHARD)
    read_adapter(file.parent)


def _gguf(file: Path) -> None:
    import torch

    load_gguf(file, torch.float32)


# The name that a file has to have, and what reads it.
PARSERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "header": (SINGLE_FILE, _header),
    "index": (INDEX_FILE, _index),
    "manifest": (FILE_NAME, _manifest),
    "shard": (SINGLE_FILE, _verified_shard),
    "packed": (PACKED_FILE, _packed),
    "config": ("config.json", _configuration),
    "yaml": ("options.yaml", read_yaml),
    "jsonl": ("texts.jsonl", lambda file: list(jsonl_texts(file, "text"))),
    "text": ("text.txt", file_text),
    "parquet": ("texts.parquet", lambda file: list(parquet_documents(file, "text"))),
    "tokens": ("tokens.safetensors", lambda file: token_file(str(file), None, None)),
    "gradients": ("gradients.safetensors", lambda file: GradientFile(file)),
    "adapter": ("adapter_config.json", _adapter),
    "gguf": ("model.gguf", _gguf),
}

# Files to begin with, whole or nearly so.
_SHARD = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
_TOKENS = json.dumps({"input_ids": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}}).encode()
_DIGEST = hashlib.sha256(b"").hexdigest()
_PACKED_RECORD = {
    "format": "secateur-bitmask",
    "version": 1,
    "secateur": "1",
    "values": "same",
    "shards": [{"header": _DIGEST, "tensors": ["a.weight"]}],
    "matrices": {
        "a.weight": {
            "dtype": "F32",
            "shape": [2, 8],
            "kept": 1,
            "sha256": _DIGEST,
            "stored": {"bitmask": _DIGEST, "compressed": _DIGEST},
        }
    },
    "dense": {},
}
_MANIFEST = {
    "format": 1,
    "versions": {"secateur": "1"},
    "method": "wanda",
    "source": {},
    "settings": {"dtype": "float32"},
    "plan": {"a": {"n": 2, "m": 4}},
    "left_out": [],
    "command": None,
    "calibration": None,
    "matrices": {
        "a": {
            "block": 0,
            "kind": "q",
            "shape": [2, 4],
            "tensor": "a",
            "index": None,
            "transposed": False,
            "pattern": {"n": 2, "m": 4},
            "sparsity": 0.5,
            "zeros": 4,
            "kept_identical": True,
            "notes": {},
            "tokens": 3,
        }
    },
    "blocks": [{"output_change": 0.1}],
    "totals": {"weights": 8, "zeros": 4, "sparsity": 0.5},
    "seconds": {},
    "tensors": {},
    "source_tensors": {},
    "headers": {"../x": "0"},
    "files": {"../../etc/passwd": "0"},
    "created": "",
}
SEEDS: dict[str, bytes] = {
    "header": len(_SHARD).to_bytes(8, "little") + _SHARD + bytes(16),
    "index": json.dumps({"weight_map": {"a": "a.safetensors"}}).encode(),
    "manifest": json.dumps(_MANIFEST).encode(),
    "shard": len(_SHARD).to_bytes(8, "little") + _SHARD + bytes(16),
    "packed": json.dumps(_PACKED_RECORD).encode(),
    "config": b'{"model_type": "llama", "hidden_size": 4, "text_config": {"num_layers": 2}}',
    "yaml": b"a: &x [1, {b: *x}]\nc: d\n",
    "jsonl": b'{"text": "a"}\n\n{"text": "b", "c": [1]}\n',
    "text": "\ufeffa\r\nb é".encode(),
    "parquet": b"PAR1" + bytes(20) + b"PAR1",
    "tokens": len(_TOKENS).to_bytes(8, "little") + _TOKENS + bytes(16),
    "gradients": len(_SHARD).to_bytes(8, "little") + _SHARD + bytes(16),
    "adapter": b'{"peft_type": "LORA", "r": 2, "target_modules": ["q"]}',
    "gguf": b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(16),
}


def parse(name: str, data: bytes, folder: Path) -> SecateurError | None:
    """Read these bytes as a file of the named format in an empty folder; returns the error that says what is wrong."""
    file, read = PARSERS[name]
    (folder / file).write_bytes(data)
    try:
        read(folder / file)
    except SecateurError as error:
        return error
    return None
