"""`secateur gradients`, and pruning with its files from the command line."""

from __future__ import annotations

import re

import pytest

from command_line import CALIBRATION, save_model
from full_autograd import NORMS, assert_same_weights
from secateur.collect.gradient_file import GradientFile


def test_the_command_writes_prints_and_tells(call, tmp_path):
    source = save_model(tmp_path / "model")
    out = tmp_path / "new" / "gradients.safetensors"
    told = call("gradients", source, "-o", out, "--norm", "l1,l2", *CALIBRATION)
    assert told.code == 0, told.err
    assert re.search(r"^[-\d]+ [:\d]+ forward, [\d.]+ s$", told.err, re.MULTILINE)
    assert re.search(r"^[-\d]+ [:\d]+ backward, [\d.]+ s$", told.err, re.MULTILINE)
    rows = [line.split() for line in told.out.splitlines()]
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        for norm in NORMS:
            assert any(row[:3] == [kind, "3", norm] for row in rows), told.out
    assert "4 samples of 32" in told.out
    assert "per sample, of the model" in told.out
    file = GradientFile(out)
    assert len(file.matrices) == 21
    assert file.provenance["norms"] == ["l1", "l2"]

    again = call("gradients", source, "-o", out, *CALIBRATION)
    assert again.code == 2
    assert again.message == f"Error: {out}: exists already. Choose another name, or pass --overwrite."
    as_json = call(
        "gradients",
        source,
        "-o",
        out,
        "--overwrite",
        "--json",
        "--granularity",
        "token",
        "--scope",
        "block",
        *CALIBRATION,
    )
    assert as_json.code == 0, as_json.err
    told = as_json.json
    assert (told["file"], told["matrices"]) == (str(out), 21)
    assert told | {"file": 0, "matrices": 0} == {"file": 0, "matrices": 0, **GradientFile(out).provenance}
    assert [told[key] for key in ("norms", "granularity", "scope", "samples")] == [["l1"], "token", "block", 4]


def test_pruning_from_the_command_line(call, tmp_path):
    source = save_model(tmp_path / "model")
    file = tmp_path / "gradients.safetensors"
    assert call("gradients", source, "-o", file, "--norm", "l1,l2", *CALIBRATION).code == 0
    gblm_l2 = ["--method", "gblm", "--norm", "l2", "--alpha", "50"]
    with_file = call("prune", source, "-o", tmp_path / "file", *gblm_l2, "--gradient", file, *CALIBRATION, "--json")
    assert with_file.code == 0, with_file.err
    assert with_file.json["settings"]["gradient"] == {"norm": "l2", "granularity": "sample", "scope": "model"}
    without = call("prune", source, "-o", tmp_path / "own", *gblm_l2, *CALIBRATION)
    assert without.code == 0, without.err
    assert re.search(r"^[-\d]+ [:\d]+ gradients: backward, [\d.]+ s$", without.err, re.MULTILINE)
    assert_same_weights(tmp_path / "file", tmp_path / "own")
    other = call("prune", source, "-o", tmp_path / "other", "--method", "gblm", "--gradient", file, *CALIBRATION)
    assert other.code == 0, other.err
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (
        tmp_path / "own" / "model.safetensors"
    ).read_bytes()
    by_hyphen = call("prune", source, "-o", tmp_path / "plus", "--method", "wanda-plus", *CALIBRATION, "--json")
    assert by_hyphen.code == 0, by_hyphen.err
    assert by_hyphen.json["method"] == "wanda_plus"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file",
        "gradients.safetensors",
        "model",
        "other",
        "own",
        "plus",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "wanda", "--alpha", "3"],
            "Error: --alpha: the method wanda has no such option; gblm, gblm_inverse, wanda_plus do.",
        ),
        (
            ["--method", "magnitude", "--norm", "l1"],
            "Error: --norm: the method magnitude has no such option; gblm, gblm_inverse, gradient, pruner_zero do.",
        ),
        (["--method", "gblm", "--norm", "l3"], 'Error: --norm: got "l3", expected l1 or l2.'),
    ],
)
def test_options_of_other_methods(arguments, message, call, tmp_path):
    (tmp_path / "model").mkdir()
    told = call("prune", tmp_path / "model", "-o", tmp_path / "out", *arguments)
    assert (told.code, told.message) == (2, message)


def test_a_norm_that_does_not_exist(call, tmp_path):
    told = call("gradients", tmp_path, "-o", tmp_path / "g", "--norm", "l1,l3")
    assert (told.code, told.message) == (2, 'Error: norm: got "l3", expected l1 or l2.')
