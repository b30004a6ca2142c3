"""Token ids as they are, and what a set of windows says of itself."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from secateur.calibration.drawing import calibration_windows, evaluation_windows
from secateur.calibration.windows import Windows, check_fits
from secateur.errors import CalibrationError

# Token ids as they are


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tensor_is_copied_to_int64(dtype):
    ids = torch.arange(12, dtype=dtype).reshape(3, 4)
    found = calibration_windows(ids, None)
    ids[0, 0] = 9
    assert found.input_ids.tolist() == torch.arange(12).reshape(3, 4).tolist()
    assert found.input_ids.dtype == torch.int64
    assert found.provenance == {"source": "tensor", "samples": 3, "length": 4}


def test_windows_pass_through_and_can_be_shortened():
    first = calibration_windows(torch.arange(12).reshape(3, 4), None)
    assert calibration_windows(first, None).digest == first.digest
    shorter = evaluation_windows(first, None, windows=2, length=4)
    assert torch.equal(shorter.input_ids, first.input_ids[:2])
    assert shorter.provenance["samples"] == 2


@pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])
def test_token_file(tmp_path, make):
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    save_file({"input_ids": ids, "other": torch.ones(1)}, tmp_path / "x.safetensors")
    found = make(tmp_path / "x.safetensors", None)
    assert found.input_ids.tolist() == ids.tolist()
    assert (found.provenance["samples"], found.provenance["length"]) == (3, 4)
    assert found.provenance["sha256"] == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    with pytest.raises(
        CalibrationError, match=r"windows of 4 tokens, expected --length 8\. Leave --length out, or make"
    ):
        make(str(tmp_path / "x.safetensors"), None, length=8)


def test_token_file_gives_the_first_samples_or_fewer_than_asked(tmp_path):
    save_file({"input_ids": torch.arange(12).reshape(3, 4)}, tmp_path / "x.safetensors")
    assert calibration_windows(tmp_path / "x.safetensors", None, samples=2).input_ids.tolist()[-1] == [4, 5, 6, 7]
    assert calibration_windows(tmp_path / "x.safetensors", None, samples=99).samples == 3


@pytest.mark.parametrize(
    "ids", [torch.ones(2, 2), torch.ones(4).long(), torch.ones(0, 4).long(), torch.ones(2, 2).bool()]
)
def test_token_ids_of_a_wrong_shape_or_type(tmp_path, ids):
    message = (
        r"got token ids of shape \([\d, ]*\) and torch\.\w+, expected \(samples, length\), not empty, in an integer"
    )
    with pytest.raises(CalibrationError, match=f"^tensor: {message}"):
        calibration_windows(ids, None)
    save_file({"input_ids": ids}, tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match=rf"x\.safetensors: {message}"):
        calibration_windows(str(tmp_path / "x.safetensors"), None)


def test_bad_token_files(tmp_path):
    with pytest.raises(CalibrationError, match=r"x\.safetensors: no such file"):
        calibration_windows(str(tmp_path / "x.safetensors"), None)
    save_file({"ids": torch.ones(2, 2).long()}, tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match=r"no tensor 'input_ids'; found: ids\. Save the ids under 'input_ids'"):
        calibration_windows(str(tmp_path / "x.safetensors"), None)
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CalibrationError, match=r"x\.safetensors: cannot be read as safetensors: "):
        calibration_windows(str(tmp_path / "x.safetensors"), None)


@pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])
def test_text_needs_a_tokenizer(make):
    with pytest.raises(
        CalibrationError,
        match=r"^python-docs: text needs a tokenizer, got None\. Pass the model's tokenizer, or token ids: "
        r"a \(samples, length\) tensor or a \.safetensors file with the key 'input_ids'\.$",
    ):
        make("python-docs", None)


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("length", 0), ("samples", -3)])
def test_counts_are_positive(tokenizer, option, value):
    with pytest.raises(CalibrationError, match=f"--{option}: got {value}, expected at least 1"):
        calibration_windows("python-docs", tokenizer, **{option: value})


def test_unknown_sampling(tokenizer):
    with pytest.raises(CalibrationError, match=r"--sampling: got 'pack', expected document or concat"):
        calibration_windows("python-docs", tokenizer, sampling="pack")


# Windows


def test_digest_is_of_the_shape_and_the_ids():
    ids = torch.arange(12).reshape(3, 4)
    digest = hashlib.sha256(struct.pack("<14q", 3, 4, *range(12))).hexdigest()
    assert Windows(ids, {}).digest == digest
    assert Windows(ids.reshape(4, 3), {}).digest != digest
    assert Windows(ids.T.contiguous().T, {}).digest == digest
    changed = ids.clone()
    changed[2, 3] += 1
    assert Windows(changed, {}).digest != digest


def test_windows_refuse_other_shapes_and_types():
    with pytest.raises(
        CalibrationError, match=r"got input_ids of shape \(4,\) and torch\.int64, expected \(samples, len"
    ):
        Windows(torch.arange(4), {})
    with pytest.raises(CalibrationError, match=r"torch\.int32, expected"):
        Windows(torch.ones(2, 2, dtype=torch.int32), {})


def test_provenance_is_json_and_tells_the_choices(tokenizer):
    found = calibration_windows("python-docs", tokenizer, samples=3, length=40, seed=11)
    provenance = json.loads(json.dumps(found.provenance))
    assert provenance == found.provenance
    assert {key: provenance[key] for key in ("role", "samples", "length", "seed")} == {
        "role": "calibration",
        "samples": 3,
        "length": 40,
        "seed": 11,
    }
    assert provenance["tokenizer"]["class"] == type(tokenizer).__name__
    [source] = provenance["sources"]
    assert (source["corpus"], source["sampling"], source["weight"]) == ("python-docs", "document", 1.0)
    assert source["draws"] >= 3
    json.dumps(evaluation_windows("python-docs", tokenizer, length=40).provenance)


def test_defaults_are_128_windows_of_2048_tokens(tokenizer):
    assert calibration_windows("python-docs", tokenizer, sampling="concat").input_ids.shape == (128, 2048)
    assert evaluation_windows("python-docs", tokenizer).length == 2048


def test_ids_outside_the_vocabulary():
    found = Windows(torch.tensor([[0, 1, 2], [3, 511, 512], [600, 0, 0]]), {})
    check_fits(found, 601, None)
    with pytest.raises(
        CalibrationError,
        match=r"^sample 1, position 2: token id 512 is outside the vocabulary of 512 ids \(2 such ids in all\); "
        r"does the tokenizer belong to this model\?$",
    ):
        check_fits(found, 512, None)
    with pytest.raises(CalibrationError, match=r"sample 0, position 1: token id -1 is outside"):
        check_fits(Windows(torch.tensor([[0, -1]]), {}), 512, None)
