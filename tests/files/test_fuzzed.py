"""Files of every format with anything in them: they are read, or refused by an error of ours, and quickly."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parsers import PARSERS, SEEDS, parse

QUICK = settings(max_examples=40, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# GGUF is read by other libraries, whose imports take seconds; its fuzzer is in fuzz/.
NAMES = [name for name in PARSERS if name != "gguf"]
OF_JSON = ("index", "manifest", "packed", "config", "jsonl", "adapter")


def check(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parse(name, data, Path(folder))


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(data=st.data())
def test_bytes_cut_changed_and_put_in(name: str, data: Any) -> None:
    pytest.importorskip("peft" if name == "adapter" else "pyarrow" if name == "parquet" else "torch")
    seed = bytearray(SEEDS[name])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(seed)))
        seed[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    check(name, bytes(seed))


@pytest.mark.parametrize("name", OF_JSON)
@QUICK
@given(value=JSON, seed=st.integers(0, 2**32))
def test_json_of_another_kind_anywhere(name: str, value: Any, seed: int) -> None:
    """One entry of a file that is right, at any depth, in the place of which stands something else."""
    pytest.importorskip("peft" if name == "adapter" else "torch")
    whole = json.loads(SEEDS[name].splitlines()[0])
    chooser, at = random.Random(seed), whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = chooser.choice(keys)
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or chooser.random() < 0.3:
            at[key] = value
            break
        at = inner
    check(name, json.dumps(whole).encode())
    check(name, json.dumps(value).encode())


@pytest.mark.parametrize("name", NAMES)
def test_what_fuzzers_begin_with_reaches_the_parser(name: str, tmp_path: Path) -> None:
    """The seeds themselves are read, or refused for what is wrong with them on purpose."""
    pytest.importorskip("peft" if name == "adapter" else "pyarrow" if name == "parquet" else "torch")
    wrong = {
        "manifest": "never",  # verified, with problems
        "shard": "format",
        "packed": "nothing in the shards",
        "index": "does not hold it",
        "yaml": "an alias stands inside",
        "parquet": "parquet",
        "gradients": "gradient",
        "adapter": "rank",
    }
    error = parse(name, SEEDS[name], tmp_path)
    if name in wrong and name != "manifest":
        assert error is not None
        assert wrong[name] in str(error).lower()
    else:
        assert error is None
