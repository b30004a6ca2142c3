"""What a checkpoint is found to be, and what a run is said to cost before it starts."""

import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
import tiny
from secateur.errors import CalibrationError, CheckpointError, PatternError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.models.opening.opened import open_model
from secateur.pruning import forecast, forecast_memory, forecast_time
from secateur.pruning.forecast import Estimate
from secateur.pruning.settings import PruneSettings
from secateur.pruning.trial import forwards
from secateur.report.inspect import detect_pattern

KINDS = [f"model.layers.*.{leaf}.weight" for leaf in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")] + [
    f"model.layers.*.self_attn.{leaf}_proj.weight" for leaf in "koqv"
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("inspect") / "llama")


def scores(rows: int = 8, columns: int = 32) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


# Patterns


@pytest.mark.parametrize("pattern", ["1:4", "1:2", "2:4", "4:8", "8:16", "16:32"])
def test_an_n_of_m_mask_is_recognised(pattern: str) -> None:
    assert detect_pattern(secateur.parse_pattern(pattern).mask(scores())) == pattern


def test_the_strictest_pattern_wins() -> None:
    alternating = torch.tensor([True, False]).repeat(4, 16)
    assert detect_pattern(alternating) == "1:2"  # it is 2:4 and 4:8 too
    assert detect_pattern(torch.tensor([True, False, False, False]).repeat(4, 8)) == "1:4"


def test_one_group_too_full_is_no_pattern() -> None:
    kept = secateur.NM(2, 4).mask(scores())
    kept[3, 4:8] = torch.tensor([True, True, True, False])
    assert detect_pattern(kept) == "unstructured"
    kept[3, :8] = torch.tensor([True, True, True, False, True, False, False, False])
    assert detect_pattern(kept) == "4:8"


def test_an_n_of_m_that_the_width_does_not_hold() -> None:
    assert detect_pattern(torch.tensor([True, False]).repeat(4, 3)) == "1:2"  # six columns: no group of 4
    assert detect_pattern(torch.tensor([True, False, False]).repeat(4, 3)) == "unstructured, equal rows"


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (torch.ones(4, 8), "dense"),
        (torch.zeros(4, 8), "all zero"),
        (torch.ones(4, 8).index_fill(1, torch.tensor([0, 1, 2]), 0), "unstructured, equal rows"),
        (torch.ones(4, 8).index_fill(0, torch.tensor([0]), 0), "unstructured"),
        (torch.ones(4, 8).fill_diagonal_(0), "unstructured, equal rows"),
        (torch.ones(1, 8).index_fill(1, torch.tensor([0]), 0), "unstructured"),  # one row has no other to equal
    ],
)
def test_other_masks(kept: Tensor, expected: str) -> None:
    assert detect_pattern(kept.bool()) == expected


# Inspection


def test_inspecting_a_dense_model(model: Path) -> None:
    result = secateur.inspect(model)
    assert result.sparsity == 0
    assert {matrix.pattern for matrix in result.matrices} == {"dense"}
    assert sorted(result.grouped("kind")) == KINDS
    assert {block: len(matrices) for block, matrices in result.grouped("block").items()} == {0: 7, 1: 7, 2: 7}


def test_inspecting_a_pruned_model(model: Path, tmp_path: Path) -> None:
    pattern = secateur.Plan(
        {
            **{f"model.layers.0.mlp.{leaf}_proj.weight": secateur.NM(2, 4) for leaf in ("down", "gate", "up")},
            "model.layers.2.self_attn.q_proj.weight": secateur.Unstructured(0.4, "row"),
            "model.layers.2.self_attn.k_proj.weight": secateur.Unstructured(0.3, "matrix"),
        }
    )
    manifest = secateur.prune(model, method=secateur.magnitude(), pattern=pattern, output=tmp_path / "out")
    result = secateur.inspect(tmp_path / "out")
    found = {matrix.name: matrix for matrix in result.matrices}
    with safe_open(tmp_path / "out" / SINGLE_FILE, "pt") as file:
        for name, matrix in found.items():
            weight = file.get_tensor(name)
            assert (matrix.shape, matrix.zeros) == (tuple(weight.shape), int((weight == 0).sum()))
            assert matrix.sparsity == matrix.zeros / weight.numel()
    assert {name: found[name].pattern for name in pattern} == {
        **{f"model.layers.0.mlp.{leaf}_proj.weight": "2:4" for leaf in ("down", "gate", "up")},
        "model.layers.2.self_attn.q_proj.weight": "unstructured, equal rows",
        "model.layers.2.self_attn.k_proj.weight": "unstructured",
    }
    assert {matrix.pattern for name, matrix in found.items() if name not in pattern} == {"dense"}
    assert result.sparsity == manifest.totals["zeros"] / sum(matrix.weights for matrix in result.matrices)
    value = json.loads(json.dumps(result.to_json()))
    assert value["sparsity"] == result.sparsity
    assert {row["name"]: row["zeros"] for row in value["matrices"]} == {n: m.zeros for n, m in found.items()}


def test_experts_are_inspected_one_by_one(tmp_path: Path) -> None:
    tiny.save("mixtral", tmp_path / "dense")
    secateur.prune(
        tmp_path / "dense",
        method=secateur.magnitude(),
        pattern=secateur.NM(2, 4),
        only=["*.experts.1.*"],
        output=tmp_path / "out",
    )
    for matrix in secateur.inspect(tmp_path / "out").matrices:
        assert matrix.pattern == ("2:4" if ".experts.1." in matrix.name else "dense")


def test_progress_is_by_block(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    secateur.inspect(model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Estimates


def estimate(model: Any, **options: Any) -> Estimate:
    """The estimate where nothing is asked of the text; windows of 64 tokens fit into the tiny models."""
    return forecast.estimate(model, **{"calibration": None, "length": 64, **options})


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("llama", secateur.NM(2, 4), {}),
        ("llama", secateur.Unstructured(0.37), {"skip": ["*.down_proj"]}),
        ("llama_tied", secateur.Unstructured(0.5), {"only": ["*.layers.1.*"]}),
        ("mixtral", secateur.NM(1, 4), {}),
        ("gpt2", secateur.Unstructured(0.5), {}),
        ("qwen3_5_text", secateur.Unstructured(0.5), {}),
    ],
)
def test_the_counts_are_those_of_the_run(name: str, pattern: secateur.Pattern, options: dict, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    method = secateur.magnitude()
    result = estimate(folder, method=method, pattern=pattern, **options)
    manifest = secateur.prune(folder, method=method, pattern=pattern, output=tmp_path / "out", **options)
    assert result.plan.to_json() == manifest.plan
    assert result.planned_weights == manifest.totals["weights"]
    assert 0 <= result.zeros - manifest.totals["zeros"] <= len(manifest.matrices)  # rounded down, each
    with safe_open(folder / SINGLE_FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    assert result.all_weights == sum(tensor.numel() for tensor in tensors.values())
    assert result.disk_bytes == sum(tensor.nbytes for tensor in tensors.values())
    kinds = sum(row.weights for row in result.kinds)
    assert kinds + sum(row.weights for row in result.left_out) == result.all_weights
    assert sum(row.planned for row in result.kinds) == len(result.plan)
    assert sum(row.matrices for row in result.kinds) == len(secateur.inspect(folder).matrices)
    for row in result.left_out:
        assert row.example in tensors
    assert result.blocks == tiny.BLOCKS
    assert (result.device, result.dtype, result.device_bytes) == ("cpu", "float32", 0)


def test_what_is_left_out_and_why(model: Path) -> None:
    rows = {row.reason: row for row in estimate(model, method=secateur.wanda()).left_out}
    assert set(rows) == {"embedding or lm_head", "bias or norm"}
    assert (rows["embedding or lm_head"].tensors, rows["bias or norm"].tensors) == (2, 7)
    assert rows["embedding or lm_head"].weights == 2 * tiny.VOCABULARY * tiny.HIDDEN


def test_kinds_of_a_partial_plan(model: Path) -> None:
    result = estimate(model, method=secateur.wanda(), pattern=secateur.NM(2, 4), skip=["*.0.mlp.*", "*.k_proj"])
    rows = {row.kind.split(".")[-2]: row for row in result.kinds}
    assert {kind: (row.matrices, row.planned) for kind, row in rows.items()} == {
        **dict.fromkeys(("down_proj", "gate_proj", "up_proj"), (3, 2)),
        **dict.fromkeys(("q_proj", "v_proj", "o_proj"), (3, 3)),
        "k_proj": (3, 0),
    }
    assert rows["k_proj"].pattern is None
    assert {row.pattern for kind, row in rows.items() if kind != "k_proj"} == {"2:4"}


def test_states_and_tokens(model: Path) -> None:
    result = estimate(model, method=secateur.wanda(), samples=10, length=48)
    assert result.tokens == 480
    assert result.states_bytes == 480 * tiny.HIDDEN * 4
    assert result.notes == []
    half = estimate(model, method=secateur.wanda(), samples=10, length=48, dtype="bfloat16")
    assert half.states_bytes == 480 * tiny.HIDDEN * 2
    for targets in ("dense", "residual"):
        beside = estimate(model, method=secateur.sparsegpt(), samples=10, length=48, within="site", targets=targets)
        assert beside.states_bytes == 3 * result.states_bytes, "before and behind a block of the dense model as well"
    none = estimate(model, method=secateur.magnitude(), samples=10, length=48)
    assert (none.tokens, none.states_bytes) == (0, 0)
    assert estimate(model, method=secateur.wanda()).tokens == 128 * 64
    assert estimate(model, method=secateur.wanda(), calibration=tiny.tokens(4, 16), length=None).tokens == 64


def test_what_gradients_add(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_memory, "resident_bytes", lambda: 0)
    options = {"samples": 10, "length": 48}
    plain = estimate(model, method=secateur.wanda(), **options)
    with_gradients = estimate(model, method=secateur.gblm(), **options)
    (note,) = with_gradients.notes
    saved = (tiny.BLOCKS + 3) * 480 * tiny.HIDDEN * 4  # what goes into each block, what comes out, and gradients of it
    assert with_gradients.states_bytes == saved
    assert note.startswith(f"Gradients first: the inputs of all blocks take {saved / 1e3:.1f} kB in memory, and their")
    assert with_gradients.disk_bytes - plain.disk_bytes == 4 * plain.planned_weights
    assert with_gradients.host_bytes > plain.host_bytes
    tokens = estimate(model, method=secateur.gradient(), **options)
    assert tokens.tokens == 480
    # Regional gradients are taken on the way, and a file holds those that were taken before.
    assert estimate(model, method=secateur.wanda_plus(), **options).disk_bytes == plain.disk_bytes
    file = tmp_path / "gradients"
    secateur.gradients(model, file, calibration=tiny.tokens())
    given = estimate(model, method=secateur.gblm(), gradient=file, **options)
    assert (given.notes, given.disk_bytes) == ([], plain.disk_bytes)
    with pytest.raises(CalibrationError, match="uses no gradients"):
        estimate(model, method=secateur.wanda(), gradient=file, **options)


def test_gradients_that_do_not_fit_take_several_passes(model: Path) -> None:
    (note, *_) = [
        note for note in estimate(model, method=secateur.gblm(), samples=10**9, length=64).notes if "first" in note
    ]
    passes = int(re.search(r"for (\d+) samples at a time in (\d+) passes over the weights", note)[2])  # type: ignore[index]
    assert passes > 1


def test_what_gram_matrices_add(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_memory, "resident_bytes", lambda: 0)  # it moves by more than these models take
    options = {"samples": 10, "length": 48}
    plain = estimate(model, method=secateur.wanda(), **options)
    second = estimate(model, method=secateur.sparsegpt(), **options)
    dense = estimate(model, method=secateur.sparsegpt(), targets="dense", **options)
    assert second.notes[0].startswith("The Gram matrices of a block take about ")
    assert dense.host_bytes > second.host_bytes > plain.host_bytes
    residual = estimate(model, method=secateur.sparsegpt(), within="site", targets="residual", **options)
    assert residual.host_bytes > second.host_bytes
    with pytest.raises(PatternError, match="changes no weights"):
        estimate(model, method=secateur.wanda(), targets="dense", **options)
    automatic = estimate(model, method=secateur.sparsegpt(), statistics_device="auto", **options)
    assert automatic.notes == second.notes, "auto is where the model is, here as for prune"
    double = estimate(model, method=secateur.sparsegpt(), dtype="float64", **options)
    assert double.notes[0] != second.notes[0], "sums of float64 take twice as much"


def test_solving_is_part_of_the_estimated_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_time, "forwards", lambda *arguments: [(1e-3, 0.0)] * 3)
    for name, seconds_of_one in {"multiplying": 2e-6, "choosing": 1e-9, "moving": 1e-12, "digesting": 1e-12}.items():
        monkeypatch.setattr(forecast_time, name, lambda *arguments, own=seconds_of_one: own)
    options: dict[str, Any] = {"samples": 100, "length": 48}

    def seconds(name: str, **more: Any) -> float:
        settings = PruneSettings(model, method=name, calibration=None, **options, **more)
        with forecast.prepared(settings, dry=True) as ready:
            return forecast_time.run_seconds(ready, passes=1).total

    names = ["magnitude", "wanda", "sparsegpt", "sparsegpt+least_squares", "admm", "alps"]
    assert [seconds(name) for name in names] == sorted({seconds(name) for name in names})
    orders = [("site", "pruned"), ("block", "pruned"), ("site", "residual"), ("site", "dense")]
    found = [seconds("alps", within=within, targets=targets) for within, targets in orders]
    assert found == sorted(set(found))
    matrices = open_model(model).skeleton.matrices
    products = sum(matrix.shape[0] * matrix.shape[1] ** 2 for matrix in matrices)
    assert seconds("sparsegpt+least_squares") - seconds("sparsegpt") == pytest.approx(25 * products * 2e-6, rel=1e-2)


def test_windows_longer_than_the_model_are_refused(model: Path) -> None:
    message = "^windows of 65 tokens, and the model has 64 positions. Use --length 64 or less.$"
    with pytest.raises(CalibrationError, match=message):
        estimate(model, method=secateur.wanda(), length=65)
    assert estimate(model, method=secateur.wanda(), length=64).notes == []
    assert estimate(model, method=secateur.magnitude(), length=65).notes == []


def test_a_trial_reads_nothing_and_leaves_nothing(model: Path) -> None:
    opened = open_model(model)
    skeleton = opened.skeleton
    skeleton.source.tensors.clear()  # type: ignore[attr-defined]  # whoever reads a tensor now fails
    shapes = {
        name: parameter.shape for name, parameter in LlamaForCausalLM(tiny.ARCHITECTURES["llama"]()).named_parameters()
    }
    skeleton.source.shape = lambda name: tuple(shapes[name])  # type: ignore[method-assign]
    skeleton.source.dtype = lambda name: torch.float32  # type: ignore[method-assign]
    found = forwards(skeleton, 16, 2, 1e-30)
    assert len(found) == 3
    assert all(token > 1e-20 for token, _ in found), "measured, and not made up from products where that failed"
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3_text", "qwen3_next", "zamba", "bloom", "mamba"])
def test_blocks_of_zeros_run_in_many_architectures(name: str, tmp_path: Path) -> None:
    skeleton = open_model(tiny.save(name, tmp_path)).skeleton
    assert all(token > 1e-20 for token, _ in forwards(skeleton, 16, 2, 1e-30))


def test_states_that_do_not_fit_are_noted(model: Path) -> None:
    result = estimate(model, method=secateur.wanda(), samples=10**12, length=64)
    assert any("memory-mapped file" in note for note in result.notes)
    kept = estimate(model, method=secateur.wanda(), samples=10**12, offload_states="never")
    assert any("--batch-size 1" in note for note in kept.notes)
    assert kept.host_bytes > 10**15 > result.host_bytes, "pages of mapped files are the system's to drop"


def test_prune_says_before_its_work_that_memory_is_short(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = SimpleNamespace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    told: list[int] = []
    with caplog.at_level(logging.WARNING):
        secateur.prune(
            model,
            output=tmp_path / "out",
            calibration=tiny.tokens(),
            offload_states="never",
            on_event=lambda event: told.append(len(caplog.messages)),
        )
    message = r"This needs about \S+ \wB of host memory, and \S+ \wB are free: use fewer or shorter samples, or "
    assert re.match(message, caplog.messages[0])
    assert told[-1] == len(caplog.messages) == 1
    assert re.match(message, estimate(model, calibration=None, length=16, offload_states="never").notes[-1])
    free.available = 10**12
    secateur.prune(model, output=tmp_path / "other", calibration=tiny.tokens())
    assert len(caplog.messages) == 1


def test_a_model_in_memory_is_noted_and_left_as_it_is() -> None:
    module = tiny.build("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = estimate(module, method=secateur.wanda(), length=64)
    assert result.notes == ["The whole model is in memory: it was given as a module, or dequantised from GGUF."]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_estimate_is_json(model: Path) -> None:
    result = estimate(model, method=secateur.wanda(), pattern=secateur.NM(2, 4))
    value = json.loads(json.dumps(result.to_json()))
    assert set(value) == set(Estimate.__dataclass_fields__)
    assert secateur.Plan.from_json(value["plan"]) == result.plan


def test_an_estimate_refuses_what_the_run_would(model: Path) -> None:
    with pytest.raises(PatternError, match="2:5 needs in_features divisible by 5"):
        estimate(model, method=secateur.wanda(), pattern=secateur.NM(2, 5))
    with pytest.raises(PatternError, match="matches none of 21 matrices"):
        estimate(model, method=secateur.wanda(), skip=["nothing"])
    with pytest.raises(CheckpointError, match="no such folder"):
        estimate(str(model / "no" / "model"), method=secateur.wanda())


def big(blocks: int, width: int, middle: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=middle,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )


def test_no_weight_is_read(tmp_path: Path) -> None:
    # A sparse file of 34 GB: a header with nothing behind it but a hole. Reading any block of it would take seconds.
    config = big(blocks=32, width=4096, middle=16384)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    entries, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * shape.numel()
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    config.save_pretrained(tmp_path)
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)
    if (tmp_path / SINGLE_FILE).stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    started = time.process_time()
    result = estimate(tmp_path, method=secateur.wanda(), length=16)
    assert result.disk_bytes == position > 30e9
    assert result.planned_weights == 32 * (4 * 4096**2 + 3 * 4096 * 16384)
    assert result.block_bytes > 1e9
    assert time.process_time() - started < 60  # most of it for the measured product; 34 GB would take minutes


MEASURE = """
import json, resource, sys, threading, time
import psutil, torch
torch.set_num_threads(1)
import secateur
from secateur.pruning.forecast import estimate
folder, out, samples = sys.argv[1], sys.argv[2], int(sys.argv[3])
method = getattr(secateur, sys.argv[4])()
ids = torch.randint(256, (samples, 128), generator=torch.Generator().manual_seed(0))
secateur.prune(folder + "/warm", method=method, calibration=ids[:2], output=out + "-warm")
process = psutil.Process()
before = process.memory_info().rss
forecast = estimate(folder + "/model", method=method, calibration=ids).host_bytes
peak, stop = [before], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
secateur.prune(folder + "/model", method=method, calibration=ids, output=out)
stop.set()
watcher.join()
print(json.dumps({"before": before, "forecast": forecast, "peak": peak[0]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "blocks"), [("wanda", 4), ("alps", 2)])
def test_the_forecast_of_memory_holds(method: str, blocks: int, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(big(blocks=blocks, width=512, middle=1024)).save_pretrained(tmp_path / "model")
        LlamaForCausalLM(big(blocks=2, width=64, middle=64)).save_pretrained(tmp_path / "warm")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out"), "8", method],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    forecast, growth = value["forecast"] - value["before"], value["peak"] - value["before"]
    weights = (tmp_path / "model" / SINGLE_FILE).stat().st_size
    assert growth > weights / 8  # the measurement saw at least one block
    assert growth <= forecast <= 3 * growth, f"forecast {forecast / 1e6:.0f} MB, measured {growth / 1e6:.0f} MB"


def test_a_damaged_file_is_refused_before_any_estimate(model: Path, tmp_path: Path) -> None:
    with safe_open(model / SINGLE_FILE, "pt") as file:
        save_file({key: file.get_tensor(key) for key in file.keys()}, tmp_path / SINGLE_FILE)  # noqa: SIM118
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert estimate(tmp_path, method=secateur.wanda(), length=64).blocks == 3
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        estimate(tmp_path, method=secateur.wanda(), length=64)
