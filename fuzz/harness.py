"""Coverage-guided fuzzing of a parser: `python fuzz/harness.py NAME [libFuzzer options]`, or `make fuzz`.

The parsers and the files to begin with are those of `tests/parsers.py`. Anything but an error of ours, an input that
takes longer than -timeout, or more memory than -rss_limit_mb ends it and leaves the input behind.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

with atheris.instrument_imports(include=["secateur", "msgspec", "json", "yaml", "gguf", "parsers"]):
    from parsers import PARSERS, SEEDS, parse


def main() -> None:
    """Fuzz the parser that the command line names, in one temporary folder that is emptied for every input."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        sys.exit(f"Give one of: {', '.join(PARSERS)}")
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    (corpus / "seed").write_bytes(SEEDS[name])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-folder-"))

    def one(data: bytes) -> None:
        for file in folder.iterdir():
            file.unlink()
        parse(name, data, folder)

    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
