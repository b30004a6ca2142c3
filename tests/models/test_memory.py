"""How much memory is free, for the host and for a container on it."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from secateur.models.flow import memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups as Linux shows them: this process in `outer/inner`, 1,000 MB free on the host."""
    root = tmp_path / "groups"
    (root / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/elsewhere\n0::/outer/inner\n")
    monkeypatch.setattr(memory, "_GROUPS", root)
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    return root


def limit(group: Path, most: str, used: int, idle: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {idle}\nactive_file 7\n")


def test_the_narrowest_limit_counts(groups: Path) -> None:
    assert memory.available_bytes() == 1000, "no group has a limit"
    limit(groups / "outer" / "inner", "max", 300, 0)
    assert memory.available_bytes() == 1000
    limit(groups / "outer" / "inner", "900", 300, 50)
    assert memory.available_bytes() == 650
    limit(groups / "outer", "500", 400, 20)
    assert memory.available_bytes() == 120
    limit(groups / "outer", "500", 800, 20)
    assert memory.available_bytes() == 0
    limit(groups / "outer", "5000", 800, 20)
    limit(groups / "outer" / "inner", "4000", 300, 50)
    assert memory.available_bytes() == 1000, "the host has no more"


@pytest.mark.parametrize("text", ["", "0::/../../etc\n", "0::\n", "4:memory:/old\n"])
def test_other_systems_have_no_such_limits(groups: Path, text: str) -> None:
    limit(groups.parent, "1", 1, 0)
    (groups.parent / "own").write_text(text)
    assert memory.available_bytes() == 1000
    (groups.parent / "own").unlink()
    assert memory.available_bytes() == 1000


def test_this_machine_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory.available_bytes() <= psutil.virtual_memory().total
