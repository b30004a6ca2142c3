"""One thread for every test, a quiet transformers, and the CPU wherever a test does not ask for a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`device="auto"` means the CPU on every machine: results are compared bit by bit."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
