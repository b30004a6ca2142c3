"""The residual stream as a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from secateur.core.gram import Gram
from secateur.core.problem import Method, Problem, Solution, chain
from secateur.errors import ModelStructureError, PatternError
from secateur.methods.least_squares import least_squares
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda
from secateur.models.flow.residual import residual_writers
from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import InputRecorder
from secateur.models.opening.opened import open_model
from secateur.models.shape.skeleton import loaded
from secateur.pruning.engine import prune
from second_order import SAMPLES, assert_close, assert_verified, calibration, inputs, load, recording

# Where each matrix of the first block writes, read from the modelling files: what it gives goes into a sum, and that
# sum next into this submodule, or out of the block (None); and the constant it is multiplied with on the way.
WRITERS: dict[str, dict[str, tuple[str | None, float]]] = {
    "llama": {"self_attn.o_proj": ("post_attention_layernorm", 1), "mlp.down_proj": (None, 1)},
    "gpt2": {"attn.c_proj": ("ln_2", 1), "mlp.c_proj": (None, 1)},  # stored (in, out), dropout before the sum
    "gptj": {"attn.out_proj": (None, 1), "mlp.fc_out": (None, 1)},  # both in one sum
    "granite": {"self_attn.o_proj": ("post_attention_layernorm", 0.7), "mlp.down_proj": (None, 0.7)},
    "opt": {"self_attn.out_proj": ("final_layer_norm", 1), "fc2": (None, 1)},  # samples and tokens in one dimension
    "opt_postnorm": {"self_attn.out_proj": ("self_attn_layer_norm", 1), "fc2": ("final_layer_norm", 1)},
    "falcon": {"self_attention.dense": (None, 1), "mlp.dense_4h_to_h": (None, 1)},  # one is added to the other in place
    "minicpm3": {"self_attn.o_proj": ("post_attention_layernorm", 1.4 / 3**0.5), "mlp.down_proj": (None, 1.4 / 3**0.5)},
    "gemma2": {},  # a norm between
    "olmo2": {},
    "mixtral": {"self_attn.o_proj": ("post_attention_layernorm", 1)},  # experts are weighted by the router
    "llama4_text": {"self_attn.o_proj": ("post_attention_layernorm", 1), "feed_forward.down_proj": (None, 1)},
    "mamba": {"mixer.out_proj": (None, 1)},
    "qwen2_moe": {"self_attn.o_proj": ("post_attention_layernorm", 1)},  # the shared expert is gated
    "afmoe": {},  # a norm behind the sum with the shared expert
    "zamba": {"mamba_decoder.mamba.out_proj": (None, 1)},  # `linear` goes into a sum that only the mamba reads
    "rwkv": {"attention.output": ("ln2", 1)},  # the other one is gated
    "falcon_h1": {
        "self_attn.o_proj": ("pre_ff_layernorm", 1),
        "mamba.out_proj": ("pre_ff_layernorm", 1),
        "feed_forward.down_proj": (None, 1),
    },
}


# The block to look at, where the first one is not like the others.
FIRST = {"afmoe": 1, "qwen2_moe": 1}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_matrices_that_write_to_the_residual_stream(name: str, dtype: torch.dtype) -> None:
    if name == "rwkv" and dtype != torch.float32 and Version(transformers.__version__) < Version("5.16"):
        pytest.skip("before transformers 5.16 an rwkv cannot be made in half precision")
    skeleton = open_model(tiny.build(name, dtype=dtype)).skeleton
    stream = Stream(skeleton, torch.split(calibration(), 3))
    block = skeleton.blocks[FIRST.get(name, 0)]
    for before in skeleton.blocks[: block.index]:
        with loaded(skeleton, before, skeleton.read(before)):
            for batch in range(len(stream.batches)):
                stream.states.put(batch, stream.run(before, batch))
    with loaded(skeleton, block, skeleton.read(block)):
        found = residual_writers(block, [m for m in skeleton.matrices if m.block == block.index], stream)
    assert {name: writer.at for name, writer in found.items()} == {
        f"{block.path}.{path}.weight": at for path, (at, _) in WRITERS[name].items()
    }
    for path, (_, factor) in WRITERS[name].items():
        assert found[f"{block.path}.{path}.weight"].factor == pytest.approx(factor, rel=1e-2)


# What the outputs of the writers are added to, where that is the block's input or goes into a submodule.
BASES = {
    "llama": ["input", "post_attention_layernorm"],
    "gpt2": ["input", "ln_2"],
    "opt": ["input", "final_layer_norm"],
    "rwkv": ["ln1"],
    "gptj": [None, None],  # both are added at once
    "falcon_h1": [None, None, "pre_ff_layernorm"],
}


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_what_writers_add_to(name: str) -> None:
    skeleton = open_model(tiny.build(name)).skeleton
    stream = Stream(skeleton, torch.split(calibration(), 3))
    block = skeleton.blocks[0]
    with loaded(skeleton, block, skeleton.read(block)):
        found = residual_writers(block, [m for m in skeleton.matrices if m.block == block.index], stream)
    assert [writer.base for writer in found.values()] == BASES[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_writer_of_massive_activations_is_one(dtype: torch.dtype) -> None:
    """Some blocks write thousands of times what is in the stream, and their sum hardly differs from what they write."""
    model = tiny.build("llama", dtype=dtype)
    model.model.layers[0].mlp.down_proj.weight *= 10000
    skeleton = open_model(model).skeleton
    block = skeleton.blocks[0]
    with loaded(skeleton, block, skeleton.read(block)):
        found = residual_writers(block, skeleton.matrices[:7], Stream(skeleton, torch.split(calibration(), 3)))
    assert found["model.layers.0.mlp.down_proj.weight"].factor == 1
    assert len(found) == 2


@torch.no_grad()
def test_a_writer_that_writes_nothing_yet_is_one() -> None:
    """A projection of zeros, as in blocks that were added to a model: the stream after it equals the one before."""
    model = tiny.build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    skeleton = open_model(model).skeleton
    stream = Stream(skeleton, torch.split(calibration(), 3))
    found = residual_writers(skeleton.blocks[0], skeleton.matrices[:7], stream)
    written = {name.removeprefix("model.layers.0."): (own.at, own.base) for name, own in found.items()}
    assert written == {
        "self_attn.o_proj.weight": ("post_attention_layernorm", "input"),
        "mlp.down_proj.weight": (None, "post_attention_layernorm"),
    }


def test_a_first_block_without_planned_writers() -> None:
    skip = ["*.0.*.o_proj.weight", "*.0.*.down_proj.weight"]
    settings: dict[str, Any] = {"method": sparsegpt(), "calibration": calibration(), "within": "site"}
    manifest = prune(tiny.build("llama"), skip=skip, targets="residual", **settings)
    assert [len(record["residual_writers"]) for record in manifest.blocks] == [0, 2, 2]


def test_a_plan_without_writers_is_refused_before_anything_is_solved() -> None:
    model = tiny.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        PatternError,
        match=r"^--targets residual: none of the planned matrices writes to the residual stream\. Plan those that do "
        r"\(such as o_proj and down_proj\), or use --targets pruned\.$",
    ):
        prune(
            model,
            method=sparsegpt(),
            calibration=calibration(),
            only=["*.q_proj*"],
            within="site",
            targets="residual",
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_input_that_is_overwritten_later_is_no_record() -> None:
    weight, x = nn.Parameter(torch.ones(3, 4), requires_grad=False), torch.ones(2, 4)
    recorder = InputRecorder({"w": (weight, False)})
    with recorder:
        x = F.relu(F.linear(x, weight) @ torch.ones(3, 4))
        F.linear(x, weight)
    assert len(recorder.inputs["w", None]) == 2
    recorder = InputRecorder({"w": (weight, False)})
    with pytest.raises(ModelStructureError, match=r"^w: the model overwrites its input after multiplying it"), recorder:
        x.mul_(F.linear(x, weight).sum())


def test_experts_are_solved_with_the_gram_matrix_of_the_tokens_routed_to_them() -> None:
    model, ids, taken = tiny.build("mixtral"), calibration(), {}
    mlp = model.model.layers[0].mlp
    seen = inputs(model, ["model.layers.0.mlp"], ids)["model.layers.0.mlp"].double()
    gate, fused, down = (
        p.detach().double() for p in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
    )
    prune(model, method=recording(taken, sparsegpt()), calibration=ids, only=["*.0.block_sparse_moe.experts.*"])
    chosen = (seen @ gate.T).softmax(dim=-1).topk(2, dim=-1).indices
    for expert in range(len(fused)):
        rows = seen[(chosen == expert).any(dim=-1)]
        half = fused.shape[1] // 2
        inner = F.silu(rows @ fused[expert, :half].T) * (rows @ fused[expert, half:].T)
        for number, x in ((1, rows), (3, rows), (2, inner)):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.w{number}.weight"
            total, tokens, samples = taken[name][Gram]
            assert (tokens, samples) == (len(rows), SAMPLES)
            assert_close(total, x.T @ x, name)
    assert len(taken) == 3 * len(fused)
    assert down.shape[2] == half


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "granite", "opt", "mixtral", "falcon_h1"])
def test_drifts_are_those_of_whole_forwards(name: str, tmp_path: Path) -> None:
    """Replay a run: hooks on the dense model and on one that is pruned site by site see the sums that solvers saw."""
    source, out, ids = tiny.save(name, tmp_path / "source"), tmp_path / "out", calibration()
    drifts: dict[str, Tensor | None] = {}
    inner = sparsegpt()

    def solve(problem: Problem) -> Solution:
        drifts[problem.name] = problem.drift
        return inner.solve(problem)

    manifest = prune(
        source,
        method=Method("recording", solve, inner.needs, inner.per),
        calibration=ids,
        within="site",
        targets="residual",
        correction=0.25,
        batch_size=3,
        output=out,
    )
    assert_verified(out, source, manifest)
    assert manifest.settings["correction"] == 0.25
    matrices = {matrix.name: matrix for matrix in open_model(source).skeleton.matrices}
    model, dense, pruned = load(source), load(source), load(out)
    compared = set()
    for record in manifest.blocks:
        for group in record["sites"]:
            for matrix in group:
                writer = record["residual_writers"].get(matrix)
                assert (drifts[matrix] is None) == (writer is None)
                if writer is None:
                    continue
                path = matrices[matrix].parameter.removesuffix(".weight")
                x = inputs(model, [path], ids)[path].double()
                ahead = behind(dense, record["path"], writer["at"], ids) - behind(
                    model, record["path"], writer["at"], ids
                )
                expected = 0.25 / writer["factor"] * ahead.double().T @ x
                assert_close(drifts[matrix], expected, matrix)
                compared.add(matrix)
            for matrix in group:
                parameter = matrices[matrix].parameter
                model.get_parameter(parameter).data.copy_(pruned.get_parameter(parameter))
    assert len(compared) == tiny.BLOCKS * len(WRITERS[name])


@torch.no_grad()
def behind(model: PreTrainedModel, block: str, at: str | None, ids: Tensor) -> Tensor:
    """What goes into a submodule of a block, or comes out of the block, as (tokens, width)."""
    seen: list[Tensor] = []
    module = model.get_submodule(block if at is None else f"{block}.{at}")
    if at is None:
        take = lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0])  # noqa: E731
        handle = module.register_forward_hook(take)
    else:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_the_residual_stream_comes_closer_to_the_dense_one() -> None:
    ids, final = calibration(), {}
    dense = tiny.build("llama")
    for targets in ("pruned", "residual"):
        model = tiny.build("llama")
        options = {} if targets == "pruned" else {"correction": 1.0}
        prune(
            model,
            method=chain(wanda(), least_squares(exact=True)),
            calibration=ids,
            within="site",
            targets=targets,
            **options,
        )
        last = f"model.layers.{tiny.BLOCKS - 1}"
        final[targets] = float((behind(model, last, None, ids) - behind(dense, last, None, ids)).norm())
    assert final["residual"] < 0.9 * final["pruned"]


def test_a_model_without_a_matrix_that_writes_to_the_residual_stream() -> None:
    with pytest.raises(
        ModelStructureError,
        match=r"^--targets residual: no matrix of model\.layers\.0 adds its outputs to the residual stream as it "
        r"is \(in some architectures a norm, or a factor for each channel, comes between\)\. Use --targets pruned for "
        r"this model\.$",
    ):
        prune(tiny.build("gemma2"), method=sparsegpt(), calibration=calibration(), within="site", targets="residual")
