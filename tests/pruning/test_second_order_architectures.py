"""Second moments are behind what was pruned before, on every kind of architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import tiny
from secateur.collect.sites import sites
from secateur.core.gram import CrossGram, Gram
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.structure import Block
from secateur.pruning.engine import prune
from second_order import (
    ORDERS,
    SAMPLES,
    Taken,
    assert_close,
    assert_verified,
    calibration,
    inputs,
    load,
    recording,
)

# GQA; transposed Conv1D; parallel attention and MLP; windows; shared keys and values; latent attention; fused experts,
# also transposed and multiplied all at once; two attentions in one block; state-space and hybrid models.
SPREAD = [
    "llama",
    "gpt2",
    "cohere",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "minicpm3",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "jetmoe",
    "longcat_flash",
    "mamba",
    "falcon_h1",
    "qwen3_next",
    "rwkv",
]
# What routes tokens, and must be left out where targets are dense.
ROUTED = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "longcat_flash", "qwen3_next")
EXPERTS = {name: ["*.experts.*"] for name in ROUTED} | {"jetmoe": ["*experts*", "*.mlp.*"]}
# Matrices that no token ever reaches, by design: LongCat's zero experts only hand their input on.
NEVER_SEEN = {"longcat_flash": ["*.experts.4.*", "*.experts.5.*"]}
# Multiplied without their module being called, so that no hook on it fires.
BY_WEIGHT_ALONE = ("mixer.dt_proj.weight",)


# By turns an architecture has one order in the tests that are not slow.
@pytest.mark.parametrize(
    ("name", "within", "targets"),
    [
        pytest.param(name, *order, marks=[] if number % len(ORDERS) == turn else pytest.mark.slow)
        for number, name in enumerate(SPREAD)
        for turn, order in enumerate(ORDERS)
    ],
)
def test_statistics_are_behind_what_was_pruned_before(name: str, within: str, targets: str, tmp_path: Path) -> None:
    """Replay a run: hooks on a model that is pruned site by site see the second moments that the solver saw."""
    source, out, ids = tiny.save(name, tmp_path / "source"), tmp_path / "out", calibration()
    taken: Taken = {}
    manifest = prune(
        source,
        method=recording(taken, sparsegpt()),
        calibration=ids,
        skip=(EXPERTS if targets == "dense" else NEVER_SEEN).get(name, []),
        within=within,
        targets=targets,
        batch_size=3,
        output=out,
    )
    assert_verified(out, source, manifest)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
    for entry in manifest.matrices.values():
        assert entry["zeros"] == entry["shape"][0] * entry["shape"][1] // 2
        # Of two columns the last may be all that is removed, and no column to its right can make up for it.
        assert entry["kept_identical"] is False or entry["shape"][1] <= 2

    matrices = {matrix.name: matrix for matrix in open_model(source).skeleton.matrices if matrix.name in taken}
    model, dense, pruned = load(source), load(source), load(out)
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    missed, compared = [], 0
    for index, record in enumerate(manifest.blocks):
        own = sorted(matrix for matrix in manifest.plan if matrices[matrix].block == index)
        groups = record["sites"] if within == "site" else [own]
        assert sorted(matrix for group in groups for matrix in group) == own, "every planned matrix is in one site"
        assert within == "block" or all(groups) or not own
        for group in groups:
            parameters = {matrices[matrix].parameter for matrix in group}
            for matrix in own:
                assert (matrices[matrix].parameter in parameters) == (matrix in group), "a parameter is in one site"
            paths = sorted(parameter.removesuffix(".weight") for parameter in parameters)
            paths = [path for path in paths if path in linear]
            seen = inputs(model, paths, ids)
            seen_dense = inputs(dense, paths, ids) if targets == "dense" else {}
            for matrix in group:
                path = matrices[matrix].parameter.removesuffix(".weight")
                gram, tokens, samples = taken[matrix][Gram]
                assert samples == SAMPLES
                if path not in seen:
                    missed.append(matrix)
                    continue
                columns = matrices[matrix].columns
                columns = slice(None) if columns is None else columns
                x = seen[path].double()[:, columns]
                assert len(x) == tokens
                assert_close(gram, x.T @ x, matrix)
                compared += 1
                assert (CrossGram in taken[matrix]) == (targets == "dense")
                if targets == "dense":
                    assert_close(taken[matrix][CrossGram][0], seen_dense[path].double()[:, columns].T @ x, matrix)
                    assert taken[matrix][CrossGram][1:] == (tokens, samples)
            for parameter in parameters:
                model.get_parameter(parameter).data.copy_(pruned.get_parameter(parameter))
    assert compared >= tiny.BLOCKS
    assert all(matrices[matrix].expert is not None or matrix.endswith(BY_WEIGHT_ALONE) for matrix in missed), missed
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits)


def test_the_sites_of_a_mixture_hold_all_its_experts() -> None:
    manifest = prune(tiny.build("mixtral"), method=wanda(), calibration=calibration(), within="site")
    for index, record in enumerate(manifest.blocks):
        prefix = f"model.layers.{index}.block_sparse_moe.experts"
        assert [set(site) for site in record["sites"][2:]] == [
            {f"{prefix}.{expert}.{leaf}.weight" for expert in range(4) for leaf in ("w1", "w3")},
            {f"{prefix}.{expert}.w2.weight" for expert in range(4)},
        ]


def test_two_attentions_of_one_block_are_two_sites() -> None:
    """LongCat's block has two attentions one after the other: the second one's inputs are behind the first one."""
    manifest = prune(
        tiny.build("longcat_flash"),
        method=wanda(),
        calibration=calibration(),
        within="site",
        skip=NEVER_SEEN["longcat_flash"],
    )
    place = {name: number for number, site in enumerate(manifest.blocks[0]["sites"]) for name in site}
    attention = "model.layers.0.self_attn"
    assert place[f"{attention}.0.o_proj.weight"] < place[f"{attention}.1.q_a_proj.weight"]


class Numbered(nn.Module):
    """A mixture of modules of their own, of which a batch reaches the one that its first token says."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"up": (4, 6), "gate": (4, 6), "down": (6, 4)}
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x[0, 0, 0] > 0)]
        return expert["down"](F.silu(expert["gate"](x)) * expert["up"](x))


class OneBatch:
    """As much of a stream as `sites` looks at."""

    def __init__(self, x: Tensor) -> None:
        self.batches, self.x = [x], x

    def run(self, block: Block, batch: int, *, aside: bool) -> Tensor:
        assert (batch, aside) == (0, True)
        return block.module(self.x)


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_batch_does_not_decide_on_the_sites_of_numbered_experts(first: int) -> None:
    module = Numbered()
    names = [f"b.0.experts.{expert}.{leaf}.weight" for expert in range(2) for leaf in ("up", "gate", "down")]
    weights = {f"b.0.{name}": weight for name, weight in module.named_parameters()}
    matrices = [
        Matrix(name, None, False, name=name, shape=tuple(weights[name].shape), block=0, tensor=name, index=None)
        for name in names
    ]
    x = torch.full((1, 3, 4), 2.0 * first - 1)
    found, _ = sites(Block(0, "b.0", module), matrices, OneBatch(x))  # type: ignore[arg-type]
    assert [[matrix.name for matrix in site.matrices] for site in found] == [
        [name for name in names if "down" not in name],
        [name for name in names if "down" in name],
    ]
