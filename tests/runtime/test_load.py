"""`load` and `generate`: packed checkpoints are models of transformers, and say what the plain ones say."""

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import secateur
import tiny
from command_line import Call
from real_data import STORIES
from secateur.errors import CheckpointError, SecateurError
from secateur.runtime.bench import Bench, Measured, Speed
from secateur.runtime.dense_calls import faster_by_mv, products_by_mv
from secateur.runtime.linear import PackedLinear
from secateur.runtime.load import load, memory_of, pack_module
from secateur.runtime.pack import pack

IDS = torch.tensor([[3, 5, 7, 11, 13, 17], [2, 4, 6, 8, 10, 12]])
# Tied embeddings, biases, experts one by one and in stacks, (in, out) storage.
ARCHITECTURES = {"llama": 21, "llama_tied": 21, "phi": 18, "gpt2": 0, "mixtral": 12, "gpt_oss": 12}


def packed_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: str) -> Path:
    tiny.build(name, dtype=dtype).save_pretrained(folder / "model")
    secateur.prune(folder / "model", method="magnitude", pattern=0.5, output=folder / "pruned")
    pack(folder / "pruned", folder / "packed", **options)
    return folder / "packed"


def packed_layers(module: torch.nn.Module) -> int:
    return sum(isinstance(part, PackedLinear) for part in module.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    packed = packed_folder(tmp_path, name)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    expected = plain(input_ids=IDS).logits
    module = load(packed)
    assert packed_layers(module) == ARCHITECTURES[name]
    assert not any(parameter.is_meta for parameter in module.parameters())
    torch.testing.assert_close(module(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    dense = load(packed, backend="dense")
    assert packed_layers(dense) == 0
    torch.testing.assert_close(dense(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)


def test_what_stays_packed_takes_less_memory(tmp_path: Path) -> None:
    packed = packed_folder(tmp_path, "llama", torch.bfloat16)
    small, large = load(packed), load(packed, backend="dense")
    assert small.dtype == large.dtype == torch.bfloat16
    assert memory_of(small) < memory_of(large)


@pytest.mark.parametrize("values", ["same", "int8"])
def test_all_packed_weights_lie_in_one_piece_of_memory(tmp_path: Path, values: str) -> None:
    module = load(packed_folder(tmp_path, "llama", values=values))
    layers = [part for part in module.modules() if isinstance(part, PackedLinear)]
    if layers[0].packed.path == "torch":
        pytest.skip("plain torch keeps what was read")
    parts = [part for layer in layers for part in (layer.masks, layer.values, layer.starts)]
    places = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places)), "none overlap"
    piece = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    assert len(piece) == 1
    assert sum(piece.values()) < sum(part.nbytes for part in parts) + 64 * len(parts)


def test_int8_values_stay_packed(tmp_path: Path) -> None:
    packed = packed_folder(tmp_path, "llama", torch.bfloat16, values="int8")
    module, dense = load(packed, dtype="float32"), load(packed, backend="dense", dtype="float32")
    assert packed_layers(module) == ARCHITECTURES["llama"]
    # What is expanded was rounded to bfloat16, the codes are multiplied as they are.
    torch.testing.assert_close(module(input_ids=IDS).logits, dense(input_ids=IDS).logits, rtol=2e-2, atol=2e-2)


def test_a_plain_checkpoint_and_what_cannot_be(tmp_path: Path) -> None:
    packed = packed_folder(tmp_path, "gpt2")
    plain = load(tmp_path / "pruned")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()(input_ids=IDS).logits
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected)
    with pytest.raises(CheckpointError, match="secateur pack"):
        load(tmp_path / "pruned", backend="packed")
    with pytest.raises(CheckpointError, match="--backend dense"):
        load(packed, backend="packed")
    with pytest.raises(SecateurError, match="backend: got 'fast', expected auto, packed, dense"):
        load(packed, backend="fast")  # type: ignore[arg-type]


def test_a_module_in_memory(tmp_path: Path) -> None:
    packed_folder(tmp_path, "llama_tied")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    expected = module(input_ids=IDS).logits
    module.model.layers[0].self_attn.q_proj.weight.data.fill_(1.0)  # no zeros any more
    changed = module(input_ids=IDS).logits
    assert not torch.equal(changed, expected)
    before = memory_of(module)
    assert pack_module(module) == ARCHITECTURES["llama_tied"] - 1
    assert type(module.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(module.lm_head) is torch.nn.Linear  # shares its weight with the embeddings
    torch.testing.assert_close(module(input_ids=IDS).logits, changed, rtol=1e-4, atol=1e-5)
    assert memory_of(module) < before


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, pruned and packed; the plain one lies beside it."""
    if not STORIES.exists():
        pytest.skip("needs the shared test data")
    folder = tmp_path_factory.mktemp("stories")
    secateur.prune(STORIES, method="magnitude", pattern=0.5, output=folder / "pruned")
    pack(folder / "pruned", folder / "packed")
    return folder


@pytest.mark.parametrize("prompt", ["Once upon a time", "Lily had a red ball", "The dog ran to"])
def test_greedy_tokens_are_those_of_the_plain_checkpoint(stories: Path, prompt: str) -> None:
    pieces: list[str] = []
    found = secateur.generate(stories / "packed", prompt, max_tokens=48, on_text=pieces.append)
    plain = AutoModelForCausalLM.from_pretrained(stories / "pruned").eval()
    inputs = AutoTokenizer.from_pretrained(stories / "pruned")(prompt, return_tensors="pt", return_token_type_ids=False)
    expected = plain.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found.tokens == expected.tolist()
    assert "".join(pieces).strip() == found.text.strip()
    assert found.first_seconds > 0
    assert found.tokens_per_second is not None


def test_the_tools_of_transformers_take_it(stories: Path) -> None:
    """`pipeline` with a prompt, and a batch of two sampled by `generate`, as the plain model answers."""
    plain, packed = load(stories / "pruned"), load(stories / "packed")
    tokenizer = AutoTokenizer.from_pretrained(stories / "packed")
    texts = [
        pipeline("text-generation", model=module, tokenizer=tokenizer)("Once upon", max_new_tokens=8, do_sample=False)
        for module in (plain, packed)
    ]
    assert texts[0] == texts[1]
    assert len(texts[1][0]["generated_text"]) > len("Once upon")
    beams = [module.generate(IDS[:, :4], max_new_tokens=6, num_beams=3) for module in (plain, packed)]
    assert torch.equal(*beams)


def test_generate_on_the_command_line(stories: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = stories / "packed"
    shown = call("generate", packed, "Once upon a time", "--max-tokens", "8")
    assert shown.code == 0
    assert shown.out.strip()
    assert "tokens per second" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    assert call("generate", packed, "--max-tokens", "8").out == shown.out
    drawn = [
        json.loads(call("generate", packed, "Once", "--temperature", "1", "--seed", seed, "--json").out)["tokens"]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for arguments, message in (
        (["Once", "--chat"], "no chat template"),
        (["Once", "--max-tokens", "100000"], "positions"),
        (["Once", "--temperature", "-1"], "expected 0 or more"),
        (["Once", "--threads", "0"], "expected at least 1"),
    ):
        result = call("generate", packed, *arguments)
        assert result.code == 2, arguments
        assert message in result.message


def test_bench(stories: Path, call: Call) -> None:
    packed = stories / "packed"
    done = call("bench", packed, "--prompt", "16", "--decode", "4", "--batch", "1,3", "-r", "2", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert [(row["backend"], row["dtype"]) for row in result["rows"]] == [("packed", "float32"), ("dense", "float32")]
    assert [speed["batch"] for speed in result["rows"][0]["decode"]] == [1, 3]
    assert result["rows"][0]["memory_bytes"] < result["rows"][1]["memory_bytes"]
    assert all(0 < speed["lowest"] <= speed["median"] <= speed["highest"] for speed in result["rows"][0]["prefill"])
    assert result["bandwidth"] > 0
    assert result["rows"][0]["file_bytes"] < result["rows"][1]["file_bytes"]
    assert result["notes"] == []
    for arguments, message in ((["--batch", "1,x"], '--batch: got "x"'), (["--prompt", "100000"], "positions")):
        refused = call("bench", packed, *arguments)
        assert refused.code == 2
        assert message in refused.message


def test_bench_packs_a_plain_checkpoint_in_memory(stories: Path, call: Call) -> None:
    """As `pack` would: the same sizes. The dense rows say what torch's fastest calls give, where these are others."""
    arguments = ("--prompt", "8", "--decode", "2", "-r", "2", "--json")
    rows = json.loads(call("bench", stories / "pruned", *arguments).out)["rows"]
    packed = json.loads(call("bench", stories / "packed", *arguments).out)["rows"]
    assert [row["backend"] for row in rows] == ["packed in memory", "dense"]
    assert rows[0]["sparse_matrices"] == packed[0]["sparse_matrices"]
    assert rows[0]["memory_bytes"] == packed[0]["memory_bytes"]
    assert rows[0]["file_bytes"] == pytest.approx(packed[0]["file_bytes"], rel=0.03)
    assert rows[1]["file_bytes"] == pytest.approx(packed[1]["file_bytes"], rel=0.03)


def test_bench_says_what_it_cannot_measure(stories: Path, call: Call, tmp_path: Path) -> None:
    secateur.prune(STORIES, method="magnitude", pattern="2:4", output=tmp_path / "pruned")
    arguments = ("--prompt", "8", "--decode", "2", "-r", "2")
    result = json.loads(call("bench", tmp_path / "pruned", *arguments, "--json").out)
    assert [note.partition(" is ")[2] for note in result["notes"]] == [
        "2:4; the kernels of GPUs for that were not measured: they run on NVIDIA GPUs, and the model lies on cpu."
    ]
    dense = call("bench", STORIES, *arguments)
    assert "has no linear layers with zeros enough to be packed" in " ".join(dense.out.split())
    if not torch.cuda.is_available():
        refused = call("bench", stories / "packed", "--device", "cuda")
        assert refused.code == 2
        assert 'device "cuda" cannot be used here' in refused.message


def test_products_by_mv_are_those_of_linear() -> None:
    layers = [torch.nn.Linear(20, 30), torch.nn.Linear(30, 10, bias=False)]
    module, x = torch.nn.Sequential(*layers), torch.randn(1, 1, 20)
    expected = module(x)
    assert set(faster_by_mv(module)) <= set(layers)
    with products_by_mv(layers):
        assert module(x).shape == (1, 1, 10)
        torch.testing.assert_close(module(x), expected)
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 20))  # several rows go another way, and never get here
    torch.testing.assert_close(module(torch.randn(2, 20)).shape, torch.Size([2, 10]))


def test_a_gain_inside_the_spread_is_none() -> None:
    def row(packed: int, low: float, high: float) -> Measured:
        speed = Speed(1, (low + high) / 2, low, high)
        return Measured(
            "m", "packed" if packed else "dense", "float32", packed, 1, 1, 1.0, [speed], [speed], None, None
        )

    def gain(packed: tuple[float, float], *dense: tuple[float, float]) -> float | None:
        rows = [row(1, *packed), *(row(0, *one) for one in dense)]
        return Bench(1, 1, 2, 1, 1.0, rows).gain(rows[0], "decode", 0)

    assert gain((10, 12), (5, 6), (1, 2)) == pytest.approx(2.0)
    assert gain((10, 12), (5, 10.5)) is None
    assert gain((1, 2), (5, 6)) == pytest.approx(1.5 / 5.5)
    assert gain((10, 12)) is None
