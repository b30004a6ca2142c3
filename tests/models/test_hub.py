"""A hub id, served from huggingface_hub's cache without any network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_a_cached_hub_id_is_pruned_offline(tmp_path: Path):
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for file in tiny.save("llama", tmp_path / "source").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    # One interpreter for both commands, as the environment is read when libraries are imported.
    script = (
        "import sys\nfrom secateur.cli import main\n"
        "words = ['prune', 'someone/tiny', '-o', 'out', '--method', 'magnitude', '--pattern', '2:4', '--json']\n"
        "sys.argv = ['secateur', *words]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "sys.argv = ['secateur', 'verify', 'out', '--source', 'someone/tiny']\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    value, end = json.JSONDecoder().raw_decode(run.stdout)
    assert (value["source"]["path"], value["source"]["revision"]) == ("someone/tiny", REVISION)
    assert "Verified." in run.stdout[end:]
