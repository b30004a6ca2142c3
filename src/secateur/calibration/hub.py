"""Data sets of the Hugging Face Hub: single files and whole data sets, fetched or from the local caches."""

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from secateur.calibration.documents import DEFAULT_FIELD, Corpus, optional, table_rows, wrong_field
from secateur.errors import CalibrationError

Role = Literal["calibration", "evaluation"]

HUB_PROBE_SECONDS = 5.0
HUB_FILES: Mapping[tuple[str, Role], tuple[str, str]] = {  # repository and file
    ("c4", "calibration"): ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
    ("c4", "evaluation"): ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
    ("wikitext2", "calibration"): ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    ("wikitext2", "evaluation"): ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}


def hub_file(name: str, role: Role) -> tuple[Path, dict[str, Any]]:
    """Return the local path of the file with a named corpus, from the cache if it is there, and its origin."""
    import huggingface_hub

    repository, file = HUB_FILES[name, role]
    found = cached(name, role)
    if found is None:
        try:
            found = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")
        except Exception as error:  # whatever the transport raises, the user needs the same advice
            raise _unreachable(name, f"{repository}/{file} could not be fetched ({error})", role) from error
    revision = Path(found).parents[file.count("/")].name
    return Path(found), {"corpus": name, "repository": repository, "file": file, "revision": revision}


def cached(name: str, role: Role) -> str | None:
    """Return that file's path in the cache, or None if it can be fetched. Raises CalibrationError if it cannot."""
    import huggingface_hub

    repository, file = HUB_FILES[name, role]
    found = huggingface_hub.try_to_load_from_cache(repository, file, repo_type="dataset")
    if isinstance(found, str):
        return found
    if trouble := hub_trouble():
        raise _unreachable(name, f"{trouble}, and {repository}/{file} is not in the local cache", role)
    return None


@functools.cache
def default_text(role: Role) -> str:
    """The text for a role where none is asked for: C4 or WikiText-2, or python-docs where the hub does not answer.

    A line says so then. Once in a process, so that all parts of a run see the same text.
    """
    name, option = ("c4", "--calibration") if role == "calibration" else ("wikitext2", "--data")
    try:
        cached(name, role)
    except CalibrationError:
        logging.getLogger("secateur").warning(
            "%s is not on this machine and the hub cannot be asked: this run takes python-docs, the text inside "
            "Python, which is no text of the papers. Figures on it compare with each other alone. %s names another.",
            name,
            option,
        )
        return "python-docs"
    return name


def hub_trouble() -> str | None:
    """Return why the hub cannot be asked, or None when it answers."""
    import huggingface_hub.constants

    # Read here because `datasets` keeps a switch of its own, which must hold for the corpora that do not need it too.
    own_switch = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if huggingface_hub.constants.HF_HUB_OFFLINE or own_switch:
        return "offline mode is on (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)"
    try:
        # One short question first: the hub's own client retries for half a minute before it gives up.
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
    except Exception as error:
        return f"{huggingface_hub.constants.ENDPOINT} does not answer ({error})"
    return None


def _unreachable(name: str, reason: str, role: Role) -> CalibrationError:
    file = "--calibration my.jsonl" if role == "calibration" else "my.jsonl"
    return CalibrationError(
        f"{name}: needs the Hugging Face Hub: {reason}. "
        f"Pass a local file, such as {file}, or python-docs, which needs no network; "
        "or run once with network, then the cached copy is used."
    )


def hub_dataset(spec: str, role: Role) -> Corpus:
    """The corpus of a spec `hf:NAME[:CONFIG][:SPLIT][:FIELD]`."""
    name, config, split, field = hub_parts(spec)
    splits = _load_dataset(spec, name, config, role)
    wanted = [split] if split else ["train"] if role == "calibration" else ["test", "validation"]
    table = next((splits[part] for part in wanted if part in splits), None)
    if table is None:
        raise CalibrationError(
            f"{spec}: no split {' or '.join(map(repr, wanted))}; splits found: {', '.join(splits)}. "
            "Name one of them as hf:NAME:CONFIG:SPLIT."
        )
    if field not in table.column_names:
        raise wrong_field(spec, field, table.column_names, "hf:NAME:CONFIG:SPLIT:FIELD")
    column = table.select_columns([field])
    documents = table_rows(lambda index: column[index][field], len(column), f"{spec}, field {field!r}")
    # The fingerprint of `datasets` names the content as loaded.
    origin = {"split": str(table.split), "field": field, "fingerprint": table._fingerprint}
    return Corpus(spec, documents, {"corpus": spec, "dataset": name, "config": config, **origin})


def hub_parts(spec: str) -> tuple[str, str | None, str | None, str]:
    """Return name, configuration, split and field; an empty part, as in `hf:NAME::test`, means the default."""
    parts = spec.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise CalibrationError(
            f"{spec}: expected hf:NAME[:CONFIG][:SPLIT][:FIELD], such as hf:allenai/c4:en:train:text."
        )
    name, config, split, field = [part or None for part in parts] + [None] * (4 - len(parts))
    return str(name), config, split, field or DEFAULT_FIELD


def _load_dataset(spec: str, name: str, config: str | None, role: Role) -> Mapping[str, Any]:
    """Return the splits of a data set; without a connection, of a local folder or from the cache of `datasets`."""
    datasets = optional("datasets", spec)
    trouble = None if Path(name).is_dir() else hub_trouble()
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or trouble is not None
        loaded: Mapping[str, Any] = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises many kinds; each text is the best account there is
        if trouble:
            raise _unreachable(spec, f"{trouble}, and it is not in the local cache ({error})", role) from error
        raise CalibrationError(
            f"{spec}: the datasets library cannot load it: {error}. Check the name and the configuration."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return loaded
