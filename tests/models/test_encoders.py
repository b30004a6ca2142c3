"""Models that are no decoders: opened as the class that they name, streamed exactly, and refused where they predict."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

import tiny
from plain_forwards import as_transformers_loads_it, block_outputs, streamed
from secateur.calibration.windows import Windows
from secateur.collect.gradient_pass import gradients
from secateur.errors import CalibrationError, ModelStructureError
from secateur.evaluate.perplexity import perplexity
from secateur.files.checkpoint import Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune
from secateur.pruning.forecast import estimate
from secateur.record.verify import verify
from secateur.report.inspect import inspect
from secateur.runtime.generate import generate


def batches_for(name: str) -> list[Tensor]:
    ids = tiny.pixels(3) if name in tiny.VISION else tiny.tokens(samples=3, length=12)
    return [ids[:2], ids[2:]]


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_replay_is_the_forward_to_the_last_bit(name: str, tmp_path: Path) -> None:
    skeleton = open_model(tiny.save(name, tmp_path / "model")).skeleton
    model, batches = as_transformers_loads_it(tmp_path / "model"), batches_for(name)
    assert type(skeleton.model) is type(model)
    paths = [block.path for block in skeleton.blocks]
    assert len(paths) == tiny.BLOCKS
    expected = [block_outputs(model, paths, batch) for batch in batches]
    for block, batch, output in streamed(skeleton, batches):
        assert torch.equal(output, expected[batch][block.index])
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@tiny.by_turns(tiny.ENCODERS, 0)
def test_prune_verify_inspect_and_plan(name: str, tmp_path: Path) -> None:
    source, out = tiny.save(name, tmp_path / "model"), tmp_path / "out"
    settings: dict[str, Any] = {"method": wanda(), "calibration": torch.cat(batches_for(name))}
    planned = estimate(source, **settings)
    manifest = prune(source, output=out, **settings)
    assert set(planned.plan) == set(manifest.matrices)
    assert {entry["sparsity"] for entry in manifest.matrices.values()} == {0.5}
    assert not any("decoder" in row["reason"] for row in manifest.left_out)
    report = verify(out, Checkpoint(source))
    assert report.ok, report.problems
    assert inspect(out).sparsity > 0.4
    kind = type(as_transformers_loads_it(out)).__name__
    assert f'\nmodel = {kind}.from_pretrained("out")\n' in (out / "README.md").read_text()


def wanda_by_hooks(model: nn.Module, stack: str, batches: list[Tensor]) -> dict[str, Tensor]:
    """Masks of Wanda at half of each row, written down anew: block by block, on the model as it is.

    Score |W_ij| times the norm of input j over all tokens; in each row the lower half goes.
    """
    masks: dict[str, Tensor] = {}
    for number, block in enumerate(model.get_submodule(stack)):
        linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        sums = {path: torch.zeros(module.in_features) for path, module in linears.items()}

        def add(module: nn.Module, args: tuple[Tensor], total: Tensor) -> None:
            total += args[0].flatten(0, -2).square().sum(0)

        handles = [module.register_forward_pre_hook(partial(add, total=sums[path])) for path, module in linears.items()]
        for batch in batches:
            model(batch)
        for handle in handles:
            handle.remove()
        for path, module in linears.items():
            score = module.weight.abs() * sums[path].sqrt()
            order = score.sort(dim=1, stable=True).indices[:, : module.in_features // 2]
            mask = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
            module.weight.mul_(mask)
            masks[f"{stack}.{number}.{path}.weight"] = mask
    return masks


def assert_wanda(source: Path, out: Path, stack: str, batches: list[Tensor], calibration: Any) -> None:
    prune(source, method=wanda(), calibration=calibration, output=out, batch_size=len(batches[0]))
    with torch.no_grad():
        expected = wanda_by_hooks(as_transformers_loads_it(source), stack, batches)
    skeleton = open_model(out).skeleton
    assert len(expected) == len(skeleton.matrices) == 6 * tiny.BLOCKS
    for matrix in skeleton.matrices:
        found = matrix.view(skeleton.source.read([matrix.tensor])) != 0
        assert torch.equal(found, expected[matrix.parameter]), matrix.name


def test_masks_of_bert_are_those_of_hooks_on_the_plain_model(tmp_path: Path) -> None:
    """Samples of two lengths: padding runs through no model."""
    source, ids = tiny.save("bert", tmp_path / "bert"), tiny.tokens(samples=6, length=16)
    mask = torch.ones_like(ids)
    mask[4:, 9:] = 0
    batches = [ids[:2], ids[2:4], ids[4:, :9]]
    assert_wanda(source, tmp_path / "out", "bert.encoder.layer", batches, Windows(ids, {}, mask))


def test_masks_of_vit_are_those_of_hooks_on_the_plain_model(tmp_path: Path) -> None:
    pixels = tiny.pixels(6)
    assert_wanda(tiny.save("vit", tmp_path / "vit"), tmp_path / "out", "layers", list(pixels.split(4)), pixels)


# What needs the next token


def asked_to_predict(folder: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    windows = {"calibration": tiny.tokens(), "output": tmp_path / "out"}
    return {
        "a perplexity": lambda: perplexity(folder, tiny.tokens()),
        "the loss whose gradients are asked for": lambda: gradients(folder, **windows),
        "the loss whose gradients gblm takes": lambda: prune(folder, method="gblm", **windows),
        "--allocation owl": lambda: estimate(folder, method="wanda", allocation="owl", calibration=tiny.tokens()),
    }


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert", "BertForMaskedLM attends in both directions (it fills masked tokens in)"),
        ("bert_classifier", "BertForSequenceClassification: has no head that predicts tokens"),
    ],
)
def test_what_needs_the_next_token_is_refused_in_a_sentence(name: str, why: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    for wanted, run in asked_to_predict(folder, tmp_path).items():
        with pytest.raises(ModelStructureError) as caught:
            run()
        assert why in str(caught.value)
        assert wanted in str(caught.value)
        assert not list(tmp_path.glob("out*"))


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """A BERT with the word pieces of a few lines of text."""
    folder = tmp_path / "model"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdest"),
    ]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tiny.save("bert", folder)
    return folder


def test_text_is_windows_as_for_a_decoder_and_none_is_written(with_tokenizer: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("a bed sat at dad's desk\n" * 40)
    assert len(AutoTokenizer.from_pretrained(with_tokenizer)("a bed").input_ids) > 3
    settings: dict[str, Any] = {"method": wanda(), "samples": 3, "length": 16}
    manifest = prune(with_tokenizer, calibration=str(text), output=tmp_path / "out", **settings)
    assert manifest.calibration is not None
    assert manifest.calibration["bos"]["used"] == "papers"
    assert {entry["tokens"] for entry in manifest.matrices.values()} == {48}
    with pytest.raises(ModelStructureError, match=r"text of its own \(self\) means nothing"):
        estimate(with_tokenizer, calibration="self", **settings)
    with pytest.raises(ModelStructureError, match=r"a text that goes on means nothing"):
        generate(with_tokenizer, prompt="a bed")


def test_roberta_has_fewer_positions_than_its_configuration_says(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 18,
        "pad_token_id": 1,
    }
    for kind, model, positions in ((RobertaConfig, RobertaModel, 16), (BertConfig, BertModel, 18)):
        folder = tmp_path / kind.__name__
        model(kind(**config)).save_pretrained(folder)
        prune(folder, method=wanda(), calibration=tiny.tokens(length=positions), output=tmp_path / f"out-{positions}")
        with pytest.raises(CalibrationError, match=f"the model has {positions} positions"):
            prune(folder, method=wanda(), calibration=tiny.tokens(length=positions + 1), output=tmp_path / "none")


def test_a_module_in_memory_as_its_folder(tmp_path: Path) -> None:
    folder = tiny.save("bert_embeddings", tmp_path / "model")
    model = as_transformers_loads_it(folder)
    prune(model, method=magnitude(), output=tmp_path / "memory")
    prune(folder, method=magnitude(), output=tmp_path / "folder")
    one, other = (as_transformers_loads_it(tmp_path / name).state_dict() for name in ("memory", "folder"))
    assert all(torch.equal(one[name], other[name]) for name in other)
