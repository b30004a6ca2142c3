"""Every command in a block of a page can be given; those of marked blocks are run, page by page, on little text."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

import secateur
from command_line import Call, save_model
from real_data import some_docs
from secateur import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- Every command in this block is run by a test\. -->\n)?^```\w*\n(.*?)^```$", re.M | re.S)
MARKED = {"allocations.md", "evaluation.md", "methods.md", "packed.md", "recovery.md", "where-it-runs.md"}

LITTLE = {"--length": "32"}
TEXT = {"--calibration": some_docs(), "--sampling": "concat", "--samples": "4", **LITTLE}
JUDGED = {"--data": some_docs(), "--windows": "2", **LITTLE}
INSTEAD = {
    "prune": TEXT,
    "allocate": TEXT,
    "gradients": TEXT,
    "recover": {"--data": some_docs(), "--held-out": "2", "--steps": "2", "--minutes": "", **LITTLE},
    "compare": {**JUDGED, "--max-nats": "9", "--min-agreement": "0"},
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
    shorts = {
        name: argument.name for argument in cli.app[command].assemble_argument_collection() for name in argument.names
    }
    left, kept = iter(words), []
    for word in left:
        if shorts.get(word) in instead:
            next(left)
        else:
            kept.append(word)
    given = [word for name, value in instead.items() if value for word in (name, value)]
    again = ["--overwrite"] if "--overwrite" in shorts and "--dry-run" not in kept else []
    return [command, *kept, *given, *again]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("documented") / "dense")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in MARKED], ids=lambda page: page.stem)
def test_the_marked_commands_run(
    page: Path, dense: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "dense", "llama"):
        (tmp_path / name).symlink_to(dense)
    for name in ("PRUNED", "pruned"):
        secateur.prune(dense, method=secateur.magnitude(), output=tmp_path / name)
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
