"""Whether a model predicts the next token: it has a head for that, and no block lets a token see later ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import ModelStructureError
from secateur.models.opening.classes import is_masked
from secateur.models.shape.structure import Block, embeddings_of, is_encoder_decoder

LEAK = 1e-4  # of the gradient with respect to the token itself; that of a causal block is exactly zero


def predicts(model: nn.Module, blocks: Sequence[Block]) -> bool:
    """Whether a model predicts the next token, as far as it says so itself; also of what an encoder goes before."""
    try:
        check_predicts(model, blocks, "", alone=False)
    except ModelStructureError:
        return False
    return True


def check_predicts(model: nn.Module, blocks: Sequence[Block], wanted: str, *, alone: bool = True) -> None:
    """Raise `ModelStructureError` for a model that says of itself that it predicts no next token.

    `wanted` is what needs such a prediction, such as "a perplexity"; `alone` says that no encoder may go before.
    """
    after_encoder = is_encoder_decoder(model)
    if after_encoder and alone:
        raise encoder_decoder(type(model).__name__, wanted)
    if hasattr(model, "get_output_embeddings") and embeddings_of(model, "get_output_embeddings") is None:
        raise ModelStructureError(
            f"{type(model).__name__}: has no head that predicts tokens, so that {wanted} means nothing for it. {ADVICE}"
        )
    if after_encoder:
        return
    if is_masked(type(model).__name__):
        raise bidirectional(model, blocks[0], "it fills masked tokens in", wanted)
    said = {
        (name, value)
        for block in blocks
        for module in block.module.modules()
        for name in ("is_decoder", "is_causal")
        if isinstance(value := getattr(module, name, None), bool)
    }
    if ("is_decoder", False) in said and not any(value for _, value in said):
        raise bidirectional(model, blocks[0], "its attention says is_decoder=False", wanted)


def sees_later_tokens(block: Block, states: Tensor, run: Callable[[Tensor], Tensor]) -> bool:
    """Whether the first of some tokens depends on the second, in a loaded block.

    `run` runs the block on hidden states. The dependence is a gradient: masked products have none at all. A block
    through which no gradient can be taken counts as one that does not.
    """
    parameters = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
    inputs = states.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(False)
            first = run(inputs)[..., 0, :]
            if not first.requires_grad:
                return False
            # Random weights: the sum of what a norm returns does not depend on its input.
            direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
            (gradient,) = torch.autograd.grad(first, inputs, direction)
    except (RuntimeError, NotImplementedError):
        return False
    finally:
        for parameter in parameters:
            parameter.requires_grad_()
    own, other = (float(gradient[..., token, :].abs().max()) for token in (0, 1))
    return other > LEAK * own


def encoder_decoder(name: str, wanted: str) -> ModelStructureError:
    """The error for an encoder-decoder of this name, of which something is `wanted` that is for decoders alone."""
    return ModelStructureError(
        f"{name}: is an encoder-decoder, and {wanted} is for decoders without an encoder. {ADVICE}"
    )


ADVICE = "compare says how far the outputs of such a model are from the dense one's."


def bidirectional(
    model: nn.Module,
    block: Block,
    why: str = "the first token's output depends on the second token",
    wanted: str = "a prediction of the next token",
) -> ModelStructureError:
    """The error for a model that attends in both directions where `wanted` needs one that does not."""
    return ModelStructureError(
        f"{block.path}: {type(model).__name__} attends in both directions ({why}), like an encoder. A token then sees "
        f"the one that it should predict, so that {wanted} means nothing. If it was trained as a decoder, say so in "
        'its config.json ("is_decoder": true).'
    )
