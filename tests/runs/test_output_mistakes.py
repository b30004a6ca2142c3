"""Outputs that cannot be, and disks without room: told in one sentence, and nothing is left behind."""

# ruff: noqa: F811 - fixtures of another file

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tiny
from full_disks import file_size_limit, small_disk, unprivileged
from refused_runs import (
    ADVICE,
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    edit,
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
)
from secateur.errors import CalibrationError, CheckpointError, NumericalError, PatternError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME
from secateur.record.verify import verify


def test_no_output(model: Path, refused: Refused) -> None:
    refused(
        CheckpointError,
        f"{model}: no output folder given; the source is never changed. Add -o OUT.",
        model,
        output=None,
    )


def test_an_output_that_exists(model: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    message = f"{out}: exists already. Choose another folder, or pass --overwrite."
    out.mkdir()
    refused(CheckpointError, message, model)
    (out / "thesis.tex").write_text("years of work")
    refused(CheckpointError, message, model)


def test_an_output_that_is_not_ours(model: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    message = (
        f"{out}: exists and holds no {FILE_NAME}, so Secateur did not write it and will not overwrite it. "
        "Choose another folder, or remove it yourself."
    )
    out.write_text("a file")
    refused(CheckpointError, message, model, overwrite=True)
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(CheckpointError, message, model, overwrite=True)


def test_an_earlier_output_outlives_a_failure(model: Path, tmp_path: Path, refused: Refused) -> None:
    prune(model, method=magnitude(), output=tmp_path / "out")
    edit(model, "model.layers.2.self_attn.q_proj.weight", lambda tensor: tensor.fill_(float("nan")))
    name = "model.layers.2.self_attn.q_proj.weight"
    refused(
        NumericalError,
        f"{name}: 1024 of 1024 weights are NaN or infinite, first nan in row 0, column 0. The checkpoint is damaged; "
        f'download it again, or leave this matrix out with --skip "{name}".',
        model,
        overwrite=True,
        kept=True,
    )
    assert verify(tmp_path / "out").ok
    prune(model, method=magnitude(), skip=[name], output=tmp_path / "out", overwrite=True)
    assert name not in verify_plan(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def verify_plan(folder: Path) -> set[str]:
    assert verify(folder).ok
    return set(json.loads((folder / FILE_NAME).read_text())["plan"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_the_source(overwrite: bool, model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to(model)
    for out in (model, model / "pruned", model / "a" / "b", tmp_path / "link", model / ".." / "model"):
        refused(
            CheckpointError,
            f"{out}: the output is the source, or lies inside it. Choose another folder.",
            model,
            output=out,
            overwrite=overwrite,
        )


def test_an_output_that_holds_the_source(model: Path, tmp_path: Path, refused: Refused) -> None:
    """With --overwrite it would be removed, with the source in it."""
    prune(model, method=magnitude(), output=tmp_path / "out")
    model = model.rename(tmp_path / "out" / "model")
    refused(
        CheckpointError,
        f"{tmp_path / 'out'}: the output holds the source ({model}). Choose another folder.",
        model,
        overwrite=True,
    )


@pytest.mark.parametrize("out", ["out", "new/folders/out"])
def test_no_permission_on_the_parent(out: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    refused(
        CheckpointError,
        f"{parent / out}: cannot be made in {parent} (no permission to write there). Choose another output folder.",
        model,
        output=parent / out,
        within=unprivileged(parent),
    )


def test_a_parent_that_is_a_file(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused(
        CheckpointError,
        f"{tmp_path / 'file' / 'out'}: cannot be made in {tmp_path / 'file'} (it is not a folder). "
        "Choose another output folder.",
        model,
        output=tmp_path / "file" / "out",
    )


def test_folders_on_the_way_are_removed_again(model: Path, tmp_path: Path, refused: Refused) -> None:
    edit(model, "model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor.fill_(float("nan")))
    refused(
        NumericalError,
        re.compile(r"model\.layers\.0\.self_attn\.q_proj\.weight: 1024 of 1024 weights .*"),
        model,
        output=tmp_path / "new" / "folders" / "out",
    )
    refused(
        PatternError,
        '--propagate: got "x", expected pruned or dense.',
        model,
        propagate="x",
        output=tmp_path / "new" / "out",
    )


def test_a_relative_output_and_source(model: Path, tmp_path: Path, refused: Refused, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        CheckpointError,
        "./model: the output is the source, or lies inside it. Choose another folder.",
        "model",
        output="./model",
    )


ROOM = "Free some space or choose another output folder."


def partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial") / "result"


def test_no_room_for_the_weights(model: Path, tmp_path: Path, refused: Refused) -> None:
    size = (model / SINGLE_FILE).stat().st_size
    with small_disk(tmp_path / "disk", size // 2048) as disk:
        refused(
            CheckpointError,
            re.compile(
                re.escape(f"{partial(disk / 'out') / SINGLE_FILE}: cannot reserve ")
                + rf"[\d,]+ bytes \(No space left on device\)\. {ROOM}"
            ),
            model,
            output=disk / "out",
        )
        assert list(disk.iterdir()) == []


def test_a_limit_on_the_size_of_files(model: Path, tmp_path: Path, refused: Refused) -> None:
    refused(
        CheckpointError,
        re.compile(
            re.escape(f"{partial(tmp_path / 'out') / SINGLE_FILE}: cannot reserve ")
            + rf"[\d,]+ bytes \(File too large\)\. {ROOM}"
        ),
        model,
        within=file_size_limit(50_000),
    )


def test_no_room_for_the_files_beside_them(model: Path, tmp_path: Path, refused: Refused) -> None:
    (model / "LICENSE").write_bytes(b"x" * 100_000)
    size = (model / SINGLE_FILE).stat().st_size
    with small_disk(tmp_path / "disk", size // 1024 + 50) as disk:
        refused(
            CheckpointError,
            f"{partial(disk / 'out') / 'LICENSE'}: cannot be written (No space left on device). {ROOM}",
            model,
            output=disk / "out",
        )
        assert list(disk.iterdir()) == []


def test_a_file_beside_the_weights_that_may_not_be_read(model: Path, tmp_path: Path, refused: Refused) -> None:
    prune(model, method=wanda(), calibration=tiny.tokens(), output=tmp_path / "before")  # everything is imported now
    (model / "LICENSE").write_text("")
    for file in model.iterdir():
        file.chmod(0 if file.name == "LICENSE" else 0o644)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused(
        CheckpointError,
        f"{model / 'LICENSE'}: cannot be read (Permission denied).",
        model,
        output=tmp_path / "open" / "out",
        within=unprivileged(model),
    )


@pytest.mark.parametrize("more", [1, 2, 4])
def test_a_disk_that_fills_up_keeps_what_is_finished(model: Path, tmp_path: Path, more: int) -> None:
    """The shards have their room from the start; journal and manifest grow."""
    arguments: dict[str, Any] = {"method": wanda(), "calibration": tiny.tokens()}
    prune(model, output=tmp_path / "before", **arguments)
    pages = [-(-file.stat().st_size // 4096) for file in (tmp_path / "before").iterdir() if file.name != FILE_NAME]
    assert (tmp_path / "before" / FILE_NAME).stat().st_size > 3 * 4096
    with small_disk(tmp_path / "disk", 4 * (sum(pages) + more)) as disk:
        out = disk / "out"
        with pytest.raises(CheckpointError) as caught:
            prune(model, output=out, **arguments)
        told = re.compile(rf"{disk}/out\.partial/.*: cannot be written \(No space left on device\)\. {ROOM}")
        assert told.fullmatch(str(caught.value))
        assert not out.exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        prune(model, output=out, resume=True, **arguments)
        assert verify(out).ok
        shards = [folder / "model.safetensors" for folder in (out, tmp_path / "before")]
        assert shards[0].read_bytes() == shards[1].read_bytes()


def test_no_room_for_the_hidden_states(model: Path, tmp_path: Path, refused: Refused) -> None:
    """A mapped file without room behind it would end the process with a bus error."""
    with small_disk(tmp_path / "disk", 64) as disk:
        refused(
            CheckpointError,
            re.compile(
                rf"{re.escape(str(disk))}: cannot hold [\d,]+ bytes of hidden states \(No space left on device\)\. "
                "Free some space there, or name another folder with --offload-states\\."
            ),
            model,
            calibration=tiny.tokens(16, 64),
            offload_states=str(disk),
        )
        assert list(disk.iterdir()) == []


def test_hidden_states_on_disk_are_removed_after_a_failure(model: Path, tmp_path: Path, refused: Refused) -> None:
    name = "model.layers.1.input_layernorm.weight"
    edit(model, name, lambda tensor: tensor.fill_(float("nan")))
    (tmp_path / "states").mkdir()
    refused(
        CalibrationError,
        "model.layers.1.self_attn.q_proj.weight: its inputs on the calibration samples contain NaN or infinity, first "
        "nan in sample 0, token 0, input 0. " + ADVICE,
        model,
        offload_states=str(tmp_path / "states"),
        kept=True,
    )
    assert list((tmp_path / "states").iterdir()) == []


def test_a_folder_for_hidden_states_that_cannot_be(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused(
        CheckpointError,
        re.compile(
            rf"{re.escape(str(tmp_path / 'file'))}: no folder for hidden states can be made "
            r"\(File exists\)\. Name another one with --offload-states\."
        ),
        model,
        offload_states=str(tmp_path / "file"),
    )
