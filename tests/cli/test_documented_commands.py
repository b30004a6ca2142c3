"""Every command in a block of a page can be given; those of marked blocks are run, page by page, on little text."""

import random
import re
import shlex
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

import secateur
import tiny
from command_line import Call, save_model
from hub_server import Hub, Repository
from real_data import some_docs
from secateur import cli
from task_files import boolq, lines

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- Every command in this block is run by a test\. -->\n)?^```\w*\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.M | re.S)
MARKED = {
    *("allocations.md", "evaluation.md", "methods.md", "own-method.md", "packed.md", "recovery.md", "report.md"),
    *("sweep.md", "tutorial.md", "where-it-runs.md"),
}
OWN_METHOD = ROOT / "docs" / "own-method.md"  # whose file other pages name
HUB_MODELS = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B")

LITTLE = {"--length": "32"}
TEXT = {"--calibration": some_docs(), "--sampling": "concat", "--samples": "4", **LITTLE}
JUDGED = {"--data": some_docs(), "--windows": "2", **LITTLE}
INSTEAD = {
    "prune": TEXT,
    "allocate": TEXT,
    "gradients": TEXT,
    "recover": {"--data": some_docs(), "--held-out": "2", "--steps": "2", "--minutes": "", **LITTLE},
    "compare": {**JUDGED, "--max-nats": "9", "--min-agreement": "0"},
    "plan": TEXT,
    "sweep": {**TEXT, "--data": some_docs(), "--eval-length": "32", "--windows": "2"},
    "generate": {"--max-tokens": "4"},
    "bench": {"--prompt": "4", "--decode": "2", "--repetitions": "2"},
}


def commands(page: Path, marked: bool = False) -> Iterator[list[str]]:
    """The arguments of every command in the blocks of a page, or in those that are marked."""
    for mark, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in re.sub(r" *\\\n *", " ", text).splitlines():
            words = shlex.split(line, comments=True) if re.match(r"([A-Z_]+=\S+ )?secateur ", line) else []
            if words and words[-1] != "..." and (mark or not marked):
                yield words[words.index("secateur") + 1 :]


def parted(arguments: list[str]) -> tuple[list[str], str]:
    """A command and the file that its output goes to, if any."""
    return (arguments[:-2], arguments[-1]) if ">" in arguments else (arguments, "")


def test_every_command_can_be_given() -> None:
    found = [(page.name, arguments) for page in PAGES for arguments in commands(page)]
    assert len(found) > 55
    for page, arguments in found:
        try:
            cli.app.parse_args(parted(arguments)[0], print_error=False, exit_on_error=False)
        except CycloptsError as error:
            pytest.fail(f"{page}: secateur {shlex.join(arguments)}: {error!r}")


@pytest.mark.parametrize("wrong", [["--sparsty", "0.5"], ["--samples", "a"], ["--targets", "dens"]])
def test_a_command_that_cannot_be_given_is_noticed(wrong: list[str]) -> None:
    with pytest.raises(CycloptsError):
        cli.app.parse_args(["prune", "MODEL", "-o", "OUT", *wrong], print_error=False, exit_on_error=False)


def on_little_text(arguments: list[str]) -> list[str]:
    """The same command with the options that make it take a second."""
    command, *words = arguments
    instead = INSTEAD.get(command, {})
    if "--tasks" in words:
        instead = (instead if command == "sweep" else {}) | {"--tasks": "boolq", "--task-data": ".", "--limit": "2"}
    if "block" in words:
        instead = {name: value for name, value in instead.items() if name not in ("--steps", "--minutes")}
        instead["--samples"] = "4"
    shorts = {
        name: argument.name for argument in cli.app[command].assemble_argument_collection() for name in argument.names
    }
    left, kept = iter(words), []
    for word in left:
        if shorts.get(word) in instead:
            next(left)
        else:
            kept.append(word)
    kept = [path for word in kept for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    given = [word for name, value in instead.items() if value for word in (name, value)]
    again = ["--overwrite"] if "--overwrite" in shorts and "--dry-run" not in kept else []
    return [command, *kept, *given, *again]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("documented") / "dense")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Modules that commands import from files of a page are gone afterwards: others may have the same names."""
    yield
    for page in PAGES:
        for name, _ in FILE.findall(page.read_text(encoding="utf-8")):
            sys.modules.pop(Path(name).stem, None)


@pytest.mark.usefixtures("some_tasks", "forgotten")
@pytest.mark.parametrize("page", [page for page in PAGES if page.name in MARKED], ids=lambda page: page.stem)
def test_the_marked_commands_run(
    page: Path, dense: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    for name in ("MODEL", "dense", "llama", "llama-1b", "llama-3b"):
        (tmp_path / name).symlink_to(dense)
    for name in HUB_MODELS:
        hub.repositories[name] = Repository()
        hub.repositories[name].files().update({file.name: file.read_bytes() for file in dense.iterdir()})
    published = page.stem == "report"  # what is pushed comes from the hub
    for name in ("PRUNED", "pruned", "wanda", "gblm"):
        secateur.prune(HUB_MODELS[-1] if published else dense, method="magnitude", output=tmp_path / name)
    if page.stem == "recovery":
        secateur.fine_tune("pruned", "adapter", data=tiny.tokens(8, 16), held_out=2, steps=1, targets=["q_proj"])
    for name, text in FILE.findall(page.read_text(encoding="utf-8") + OWN_METHOD.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(text)
    for part in ("train", "validation"):
        lines(tmp_path / f"boolq_{part}.jsonl", boolq(random.Random(0), 8))
    found = list(commands(page, marked=True))
    assert found
    for arguments in found:
        command, file = parted(arguments)
        result = call(*on_little_text(command))
        assert result.code == 0, f"{shlex.join(arguments)}: {result.err}"
        if file:
            Path(file).write_text(result.out)


def test_all_pages_with_marks_are_run() -> None:
    marked = {page.name for page in PAGES if any(mark for mark, _ in BLOCK.findall(page.read_text(encoding="utf-8")))}
    assert marked == MARKED | {"README.md"}  # the README's are run by a test of their own
