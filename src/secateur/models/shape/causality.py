"""Whether a block lets a token see later ones, as encoders do: predicting the next token then tests nothing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import ModelStructureError
from secateur.models.shape.structure import Block

LEAK = 1e-4  # of the gradient with respect to the token itself; that of a causal block is exactly zero


def check_declared(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Raise `ModelStructureError` for blocks whose attention modules declare that they are not a decoder's."""
    said = {
        (name, value)
        for block in blocks
        for module in block.module.modules()
        for name in ("is_decoder", "is_causal")
        if isinstance(value := getattr(module, name, None), bool)
    }
    if ("is_decoder", False) in said and not any(value for _, value in said):
        raise _bidirectional(model, blocks[0].path, "its attention says is_decoder=False")


def check_causal(model: nn.Module, block: Block, states: Tensor, run: Callable[[Tensor], Tensor]) -> None:
    """Raise `ModelStructureError` when the first of two tokens depends on the second, in a loaded block.

    `run` runs the block on hidden states. The dependence is a gradient: masked products have none at all. A block
    through which no gradient can be taken passes.
    """
    parameters = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
    inputs = states.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(False)
            first = run(inputs)[..., 0, :]
            if not first.requires_grad:
                return
            # Random weights: the sum of what a norm returns does not depend on its input.
            direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
            (gradient,) = torch.autograd.grad(first, inputs, direction)
    except (RuntimeError, NotImplementedError):
        return
    finally:
        for parameter in parameters:
            parameter.requires_grad_()
    own, other = (float(gradient[..., token, :].abs().max()) for token in (0, 1))
    if other > LEAK * own:
        raise _bidirectional(model, block.path, "the first token's output depends on the second token")


def _bidirectional(model: nn.Module, where: str, why: str) -> ModelStructureError:
    return ModelStructureError(
        f"{where}: {type(model).__name__} attends in both directions ({why}), like an encoder. A token then sees the "
        "one that it should predict, so that a perplexity means nothing; Secateur prunes decoder-only language models. "
        'If it was trained as a decoder, say so in its config.json ("is_decoder": true).'
    )
