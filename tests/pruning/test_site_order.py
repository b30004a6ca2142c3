"""Sites, blocks and targets in the order of a loop by hand, which uses nothing of Secateur but equations."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import reference_solvers
import tiny
from secateur.core.patterns import NM, Pattern
from secateur.core.problem import Method, chain
from secateur.methods.least_squares import least_squares
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.pruning.named import method_of
from second_order import HALF, ORDERS, PATTERNS, RESIDUAL, SAMPLES, calibration, every_order, inputs

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
SITES = [ATTENTION, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
EVERYWHERE = [path for site in SITES for path in site]


# The sequential loop by hand


def keep_highest(score: Tensor, pattern: Pattern) -> Tensor:
    """The mask per row, or per group of M."""
    m = pattern.m if isinstance(pattern, NM) else score.shape[1]
    groups = score.reshape(-1, m)
    removed = int(m * pattern.sparsity)
    order = groups.argsort(dim=1, stable=True)
    return torch.ones_like(groups, dtype=torch.bool).scatter(1, order[:, :removed], False).view_as(score)


def wanda_by_hand(weight: Tensor, x: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    return weight * keep_highest(weight.abs() * x.square().sum(dim=0).sqrt(), pattern)


def sparsegpt_by_hand(weight: Tensor, x: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """The published loop on the weights that fit the targets best, which are W itself where those are its outputs."""
    damped = x.T @ x
    added = 0.01 * damped.diagonal().mean()
    damped = damped + added * torch.eye(len(damped), dtype=damped.dtype)
    best = torch.linalg.solve(damped, right + added * weight, left=False)
    if isinstance(pattern, NM):
        select, every = reference_solvers.groups_of(pattern.n, pattern.m), pattern.m
    else:
        select, every = reference_solvers.pooled(len(weight), pattern.sparsity), 128
    return reference_solvers.sparsegpt(best, x.T @ x, select, every=every)[0]


def least_squares_by_hand(weight: Tensor, x: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
    """Wanda's mask, and row by row the normal equations on it: ``w (G + 0.01 diag G) = targets xᵀ + 0.01 W diag G``."""
    mask = wanda_by_hand(weight, x, right, pattern) != 0
    gram = x.T @ x
    ridge = 0.01 * gram.diagonal().diag()
    right = right + weight @ ridge
    result = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        result[row, kept] = torch.linalg.solve((gram + ridge)[kept][:, kept], right[row, kept])
    return result


BY_HAND: dict[str, tuple[Method, Callable[[Tensor, Tensor, Tensor, Pattern], Tensor]]] = {
    "wanda": (wanda(), wanda_by_hand),
    "sparsegpt": (sparsegpt(), sparsegpt_by_hand),
    "wanda+least_squares": (chain(wanda(), least_squares(exact=True)), least_squares_by_hand),
}


@torch.no_grad()
def prune_by_hand(
    model: PreTrainedModel,
    ids: Tensor,
    solve: Callable[[Tensor, Tensor, Tensor, Pattern], Tensor],
    pattern: Pattern,
    within: str,
    targets: str,
) -> None:
    """Prune a LLaMA in place: look at the inputs of a site in whole forwards, prune it, look at the next one's."""
    dense = deepcopy(model)
    for index in range(len(model.model.layers)):
        for site in SITES if within == "site" else [EVERYWHERE]:
            prefix = f"model.layers.{index}"
            paths = [f"{prefix}.{path}" for path in site]
            x, x_dense = inputs(model, paths, ids), inputs(dense, paths, ids)
            # Where each of the two sums of a block goes next: into a norm, or into the next block or the last norm.
            later = "model.norm" if index == tiny.BLOCKS - 1 else f"model.layers.{index + 1}.input_layernorm"
            behind = {"o_proj": f"{prefix}.post_attention_layernorm", "down_proj": later}
            streams = [inputs(one, list(behind.values()), ids) for one in (dense, model)]
            for path in paths:
                weight = model.get_submodule(path).weight
                right = weight @ (x_dense if targets == "dense" else x)[path].T @ x[path]
                norm = behind.get(path.rpartition(".")[2])
                if targets == "residual" and norm is not None:
                    right += 0.5 * (streams[0][norm] - streams[1][norm]).T @ x[path]
                weight.copy_(solve(weight, x[path], right, pattern))


def difference(one: nn.Module, two: nn.Module) -> dict[str, float]:
    """For each matrix of the blocks the largest difference, relative to the largest weight."""
    other = two.state_dict()
    return {
        name: float((value - other[name]).abs().max() / value.abs().max())
        for name, value in one.state_dict().items()
        if name.endswith("proj.weight")
    }


@tiny.pairs_by_turns(
    "name, within, targets, pattern",
    [
        ("wanda", "site", "pruned"),
        ("sparsegpt", "block", "pruned"),
        *[("sparsegpt", within, targets) for within, targets in [*ORDERS, RESIDUAL]],
        *[("wanda+least_squares", within, targets) for within, targets in [RESIDUAL, *ORDERS]],
    ],
    PATTERNS,
)
def test_the_order_is_that_of_a_loop_by_hand(name: str, within: str, targets: str, pattern: Pattern) -> None:
    method, by_hand = BY_HAND[name]
    model, expected = (tiny.build("llama", dtype=torch.float64) for _ in range(2))
    prune_by_hand(expected, calibration(), by_hand, pattern, within, targets)
    manifest = prune(
        model,
        method=method,
        pattern=pattern,
        calibration=calibration(),
        within=within,
        targets=targets,
        batch_size=3,
    )
    state, wanted = model.state_dict(), expected.state_dict()
    for matrix in manifest.matrices:
        assert torch.equal(state[matrix] != 0, wanted[matrix] != 0), matrix
    assert max(difference(model, expected).values()) < (1e-14 if name == "wanda" else 1e-9)
    assert manifest.settings["within"] == within
    assert manifest.settings["targets"] == targets


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "wanda+least_squares"])
def test_the_loop_by_hand_can_tell_orders_apart(name: str) -> None:
    """What comes first is the same in any order, and what comes after is not."""
    results = {}
    for within, targets in [("block", "pruned"), *ORDERS, RESIDUAL]:
        if name == "wanda" and targets != "pruned":
            continue
        model = tiny.build("llama", dtype=torch.float64)
        prune(model, method=BY_HAND[name][0], calibration=calibration(), within=within, targets=targets)
        results[within, targets] = model
    first = [f"model.layers.0.{path}.weight" for path in ATTENTION]
    plain = results.pop(("block", "pruned"))
    for (within, targets), model in results.items():
        found = difference(model, plain)
        assert max(found[matrix] for matrix in first) < 1e-12
        same = {matrix for matrix, value in found.items() if value < 1e-6}
        own = set(first) if within == "site" else {matrix for matrix in found if ".layers.0." in matrix}
        assert same == own, (within, targets)


def test_the_sites_of_a_llama_are_in_the_manifest() -> None:
    manifest = prune(tiny.build("llama"), method=sparsegpt(), calibration=calibration(), within="site")
    for index, record in enumerate(manifest.blocks):
        prefix = f"model.layers.{index}."
        found = [sorted(name.removeprefix(prefix) for name in site) for site in record["sites"]]
        assert found == [sorted(f"{path}.weight" for path in site) for site in SITES]
        assert 0 < record["output_change"] < 2
    plain = prune(tiny.build("llama"), method=sparsegpt(), calibration=calibration())
    assert not any("sites" in record for record in plain.blocks)
    assert plain.settings["within"] == "block"
    assert plain.settings["targets"] == "pruned"


def test_sites_of_some_matrices() -> None:
    """Sites hold what is planned; a block without a planned matrix has none, and what comes after it is unharmed."""
    only = ["*.0.self_attn.k_proj*", "*.0.*.up_proj*", "*.2.*.down_proj*", "*.2.*.q_proj*"]
    model, expected = (tiny.build("llama", dtype=torch.float64) for _ in range(2))
    manifest = prune(model, method=wanda(), calibration=calibration(), only=only, within="site", batch_size=3)
    assert [record.get("sites", []) for record in manifest.blocks] == [
        [["model.layers.0.self_attn.k_proj.weight"], ["model.layers.0.mlp.up_proj.weight"]],
        [],
        [["model.layers.2.self_attn.q_proj.weight"], ["model.layers.2.mlp.down_proj.weight"]],
    ]
    for path in ("0.self_attn.k_proj", "0.mlp.up_proj", "2.self_attn.q_proj", "2.mlp.down_proj"):
        x = inputs(expected, [f"model.layers.{path}"], calibration())[f"model.layers.{path}"]
        weight = expected.get_submodule(f"model.layers.{path}").weight.data
        weight.copy_(wanda_by_hand(weight, x, weight @ x.T @ x, HALF))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


# Batches


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
@every_order
def test_the_batch_size_changes_no_mask(name: str, within: str, targets: str) -> None:
    results = []
    for size in (1, 3, SAMPLES):
        model = tiny.build("llama", dtype=torch.float64)
        manifest = prune(
            model,
            method=method_of(name),
            calibration=calibration(),
            batch_size=size,
            within=within,
            targets=targets,
        )
        assert manifest.settings["batch_size"] == size
        results.append(model.state_dict())
    for matrix in manifest.matrices:
        for other in results[1:]:
            assert torch.equal(results[0][matrix] != 0, other[matrix] != 0), matrix
            # Sums are rounded relative to their largest entry, and iterations magnify that.
            close = 1e-5 if name == "alps" else 1e-8
            assert torch.allclose(results[0][matrix], other[matrix], rtol=close, atol=close), matrix


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_the_batch_size_hardly_changes_float32_masks(name: str) -> None:
    results = []
    for size in (1, 3, SAMPLES):
        model = tiny.build("llama")
        manifest = prune(model, method=method_of(name), calibration=calibration(), batch_size=size)
        results.append(model.state_dict())
    for other in results[1:]:
        pairs = [(results[0][matrix], other[matrix]) for matrix in manifest.matrices]
        same = torch.cat([((one != 0) == (two != 0)).flatten() for one, two in pairs])
        assert float(same.double().mean()) > 0.98
        far = torch.cat([(one - two).abs().flatten() for one, two in pairs])[same]
        assert float(far.median()) < 1e-4
