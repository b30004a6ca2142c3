"""A module stays as it was given, whatever happens while gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import secateur
import tiny
from full_autograd import NORMS, interrupting, take
from pruned_checkpoints import bits
from secateur.collect.block_gradients import GradientPass
from secateur.errors import CalibrationError
from secateur.methods.wanda import wanda
from secateur.models.flow.backward import GradientTap, next_tokens
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import tapped
from secateur.pruning.engine import prune


def watched_model(name: str = "llama") -> tuple[nn.Module, Callable[[], None]]:
    """A module in training mode, some parameters frozen, and a check that it is still as it was given."""
    model = tiny.build(name)
    model.train()
    model.get_submodule("model.layers.1.self_attn").eval()
    model.requires_grad_()
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    accumulated: list[str] = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, path=path: accumulated.append(path))
    weights = {path: value.clone() for path, value in model.state_dict().items()}
    modes = {path: module.training for path, module in model.named_modules()}
    trained = {path: parameter.requires_grad for path, parameter in model.named_parameters()}

    def check() -> None:
        assert accumulated == []
        assert all(parameter.grad is None for parameter in model.parameters())
        assert {path: parameter.requires_grad for path, parameter in model.named_parameters()} == trained
        assert {path: module.training for path, module in model.named_modules()} == modes
        now = model.state_dict()
        assert now.keys() == weights.keys()
        assert all(torch.equal(bits(now[path]), bits(value)) for path, value in weights.items())

    return model, check


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_module_stays_as_it_was_given(name, scope, tmp_path):
    model, check = watched_model(name)
    ids = tiny.tokens(samples=4, length=16)

    def no_gradients(stage: str, done: int, total: int) -> None:
        assert all(parameter.grad is None for parameter in model.parameters())

    take(model, tmp_path / "gradients", ids, scope=scope, progress=no_gradients)
    check()


@pytest.mark.parametrize("stage", ["record", "forward", "head", "backward", "write"])
def test_a_module_stays_as_it_was_given_after_a_failure(stage, ids, tmp_path):
    model, check = watched_model()
    with pytest.raises(KeyboardInterrupt):
        take(model, tmp_path / "gradients", ids, progress=interrupting(stage))
    check()
    # What is finished stays, for a run that goes on.
    assert (tmp_path / "gradients.partial").exists() == (stage in ("backward", "write"))
    assert not (tmp_path / "gradients").exists()


@pytest.mark.parametrize(
    "options",
    [{"only": ["nothing"]}, {"calibration": tiny.tokens() + 1000}],
    ids=["no such matrix", "no such token"],
)
def test_a_module_stays_as_it_was_given_after_a_mistake(options, ids, tmp_path):
    model, check = watched_model()
    with pytest.raises(secateur.SecateurError):
        take(model, tmp_path / "gradients", ids, **options)
    check()


def test_a_module_stays_as_it_was_given_after_a_mistake_in_pruning(ids, file):
    model, check = watched_model()
    with pytest.raises(CalibrationError, match="the method wanda uses no gradients"):
        prune(model, method=wanda(), calibration=ids, gradient=file.path)
    check()


def test_parameters_never_have_a_gradient(ids, tmp_path):
    """Looked at while each block of a folder is loaded."""
    skeleton = open_model(tiny.save("mixtral", tmp_path / "source"), dtype="float64").skeleton
    skeleton.load_outside()
    seen = []

    def look(block, tap) -> None:
        for parameter in skeleton.model.parameters():
            assert parameter.grad is None
            assert not parameter.requires_grad
        for total in tap.totals().values():
            assert total.grad_fn is None
            assert not total.requires_grad
        seen.append(block)

    def parameters(block):
        return tapped(block, [m for m in skeleton.matrices if m.block == block.index])[0]

    taking = GradientPass(skeleton, parameters, look, partial(GradientTap, norms=NORMS), next_tokens)
    taking.of_model(ids.split(1))
    taking.of_blocks(ids.split(1))
    assert len(seen) == 2 * tiny.BLOCKS
