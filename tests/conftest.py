"""One thread for every test, a quiet transformers, a store of its own, and the CPU where a test asks for no GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

# What they assert is explained as in the tests themselves.
pytest.register_assert_rewrite(
    "full_autograd", "gguf_files", "pruned_checkpoints", "refused_runs", "second_order", "tuned_blocks"
)


def pytest_collection(session: pytest.Session) -> None:
    """Where others run the tests this process collects none, and they would wait for what it imports."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """What libraries and collected tests are made of stays: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep between runs goes into a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(autouse=True)
def _messages_as_they_are_written() -> Iterator[None]:
    """Errors name options, as they do in the code; what calls of Python make of that, `test_arguments.py` shows."""
    from secateur.arguments import command_line

    with command_line():
        yield


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`device="auto"` means the CPU on every machine: results are compared bit by bit."""
    import torch

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
