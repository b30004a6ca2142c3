"""The documentation is true: its commands run, its files exist, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from command_line import save_model
from secateur import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(
    r"^<!-- (?:Every command in this block|This block) is run by a test\. -->\n```(\w*)\n(.*?)^```$", re.M | re.S
)


def blocks(language: str) -> list[str]:
    return [text for kind, text in MARKED.findall(README) if kind == language]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("readme") / "model")


def test_the_marked_blocks_are_there() -> None:
    assert len(MARKED.findall(README)) == README.count("run by a test. -->") == 2
    assert [line.split()[1] for line in blocks("")[0].splitlines()] == [
        "plan",
        "prune",
        "allocate",
        "sweep",
        "recover",
        "merge",
        "eval",
        "compare",
        "report",
        "gradients",
        "pack",
        "unpack",
        "generate",
        "bench",
        "inspect",
        "verify",
    ]


def test_the_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"MODEL": str(model), "PRUNED": str(tmp_path / "pruned"), "GRADIENTS": str(tmp_path / "gradients.st")}
    names["PLAN"] = str(tmp_path / "plan.json")
    names |= {name.upper(): str(tmp_path / name) for name in ("table", "adapter", "merged", "packed", "unpacked")}
    shown = {}
    for line in blocks("")[0].splitlines():
        arguments = [names.get(word, word) for word in shlex.split(line)]
        assert arguments[0] == "secateur"
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capfd.readouterr()
        assert end.value.code in (0, None), captured.err
        shown[arguments[1]] = captured.out
    assert "2:4" in shown["plan"]
    assert "Plan by sensitivity" in shown["allocate"]
    assert "sparsity 0.5000 (asked 0.5000)" in shown["prune"]
    assert re.search(r"^method +50% +60% +2:4$", shown["sweep"], re.M)
    assert "Recovered with lora" in shown["recover"]
    assert re.search(r"^sparsity of planned weights +0\.5000 +0\.5000 +0\.5000$", shown["merge"], re.M)
    assert re.search(r"^21 packed matrices ", shown["pack"], re.M)
    assert "every tensor as it was packed" in shown["unpack"]
    assert shown["generate"].strip()
    assert re.search(r"packed +float32 +1 +[\d.]+ \(", shown["bench"])
    assert "8 x 128" in shown["eval"]
    assert "same first choice" in shown["compare"]
    assert (tmp_path / "pruned" / "report" / "index.html").exists()
    assert "per sample, of the model" in shown["gradients"]
    assert "Sparsity of all prunable matrices: 0.5000" in shown["inspect"]
    assert shown["verify"].rstrip().endswith("Verified.")


def test_the_python_block(model: Path, tmp_path: Path) -> None:
    (block,) = blocks("python")
    script = f"MODEL, PRUNED = {str(model)!r}, {str(tmp_path / 'pruned')!r}\n{block}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    perplexity, error = map(float, done.stdout.split())
    assert 100 < perplexity < 900
    assert 0 < error < perplexity
    assert secateur.inspect(tmp_path / "pruned").sparsity == 0.5


def test_the_method_in_the_documentation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    code, commands, _ = re.findall(r"^```\w*\n(.*?)^```$", text[text.index("## A method of your own") :], re.M | re.S)
    name = code.splitlines()[0].removeprefix("# ")
    (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    short = ["--calibration", "python-docs", "--sampling", "concat", "--samples", "4", "--length", "32"]
    weights = []
    for command, method in zip(commands.splitlines(), ("input-only", "input-only+least_squares"), strict=True):
        names = {"MODEL": str(model), "OUT": method}
        monkeypatch.setattr(sys, "argv", [*(names.get(word, word) for word in shlex.split(command)), *short])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None), capfd.readouterr().err
        assert f"Pruned with {method} " in capfd.readouterr().out.replace("\n", " ")
        weights.append(load_file(tmp_path / method / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"])
    sys.modules.pop(Path(name).stem, None)
    # Whole columns go: every row lost the same inputs.
    chosen, fitted = weights
    assert ((chosen == 0).all(dim=0) | (chosen != 0).all(dim=0)).all()
    assert (chosen == 0).sum() * 2 == chosen.numel()
    assert torch.equal(chosen == 0, fitted == 0)
    assert not torch.equal(chosen, fitted)


def test_commands_in_sentences_have_options_that_exist() -> None:
    names = "|".join(name for name in cli.app if not name.startswith("-"))
    found = 0
    for page in PAGES:
        for line in re.findall(rf"(?<!`)`(secateur (?:{names})[^`\n#]*)`", page.read_text(), re.M):
            words = line.split()
            arguments = cli.app[words[1]].assemble_argument_collection()
            known = {option for argument in arguments for option in argument.names}
            assert {word for word in words[2:] if re.match(r"--?[a-z]", word)} <= known, f"{page.name}: {line}"
            found += 1
    assert found >= 6


# Links and files


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", README)}
    assert {page.resolve() for page in PAGES[1:]} <= linked


def test_the_architecture_page_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = [name for cell in re.findall(r"^\| (`.*?`) \|", text, re.M) for name in re.findall(r"`([\w/.]+)`", cell)]
    assert len(named) == len(set(named))
    package = ROOT / "src" / "secateur"
    for name in named:
        assert (package / name).exists(), name
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    whole = ("cli/", "methods/", "report/")  # whose files are of one kind
    unnamed = {module for module in modules if module not in named and not module.startswith(whole)}
    assert unnamed == set()


def test_the_changelog_knows_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings
    assert headings[0] == "Unreleased" or headings[0].startswith(f"{secateur.__version__} ")
    assert f"\nversion: {secateur.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_files_that_the_readme_speaks_of() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make ([\w-]+)", README)) - {"sure"} <= set(targets)
    assert (ROOT / "LICENSE").exists()
    extras = re.findall(r"secateur\[(\w+)\]", README)
    project = (ROOT / "pyproject.toml").read_text()
    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.M), extra
