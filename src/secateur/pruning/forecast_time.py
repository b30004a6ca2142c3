"""How long a run will take: what it does, times the pace of this machine."""

import math

import torch

from secateur.core.gram import Gram
from secateur.models.flow.stream import default_batch_size
from secateur.models.shape.matrices import numbered_experts
from secateur.models.shape.skeleton import Skeleton
from secateur.pruning.forecast_memory import inputs_of, source_bytes
from secateur.pruning.preparation import Prepared
from secateur.pruning.settings import PruneSettings
from secateur.pruning.trial import Pace, forwards, moving, multiplying, pace

DISK_BYTES_PER_SECOND = 500e6  # a plain SSD; no disk is measured, since that would take writing to it
AROUND_SECONDS = 1.0  # manifest, model card, and the libraries that write them
LENGTH = 512  # of windows where none is known


def run_seconds(ready: Prepared, *, passes: int) -> float:
    """About how long a prepared run takes from here on.

    Two forwards for statistics of inputs, four for gradients of the loss and the head's, two more than before for
    regional ones, and what `_further_forwards` says; choosing and solving; reading, converting, hashing and writing.
    """
    skeleton, method = ready.opened.skeleton, ready.method
    planned = ready.matrices
    last = max(matrix.block for matrix in planned)
    own = pace(skeleton, method, ready.plan[planned[0].name], ready.length, ready.chosen_batch_size)
    tokens = ready.samples * ready.length
    batches = math.ceil(ready.samples / ready.chosen_batch_size)
    once = sum(token * tokens + batch * batches for token, batch in own.forwards[: last + 1])
    sweeps = 2.0 + _further_forwards(ready.settings) if method.needs or ready.regional else 0.0
    if ready.takes_gradients or ready.regional:
        sweeps += 4 if ready.takes_gradients else 2
    computing = sweeps * once
    weights = sum(math.prod(matrix.shape) for matrix in planned)
    computing += own.weight * weights
    if ready.takes_gradients:
        # The head forwards and back, and the logits about six times through memory; each sample's gradients once.
        logits = tokens * skeleton.vocabulary_size
        computing += logits * (3 * skeleton.hidden_size * own.multiply + 24 * own.move)
        computing += 4 * own.move * 4 * weights * ready.samples + own.digest * _stored(ready)
    computing += _solving(ready, own)
    # Reading, hashing and writing go on beside all this, and take a part of the cores; a block is read before them.
    bytes_ = _stored(ready)
    disk = bytes_ * ((0 if skeleton.resident else 1) + 1) / DISK_BYTES_PER_SECOND
    hashing = own.digest * 2 * bytes_
    converting = own.move * 3 * bytes_ * passes
    busy = computing + converting + hashing / max(1, torch.get_num_threads())
    return max(busy, disk + hashing / 2) + AROUND_SECONDS


def _stored(ready: Prepared) -> int:
    skeleton = ready.opened.skeleton
    return source_bytes(skeleton, skeleton.source.names)


def _solving(ready: Prepared, own: Pace) -> float:
    """The Gram matrices, of which half is multiplied, and what methods multiply with them."""
    method, planned = ready.method, ready.matrices
    products = sum(method.products * math.prod(matrix.shape) * matrix.shape[1] for matrix in planned)
    if Gram in method.needs:
        share = _share_of_experts(ready.opened.skeleton)
        tokens = ready.samples * ready.length
        for matrix, inputs in inputs_of(planned):
            products += 0.6 * inputs * tokens * matrix.shape[1] ** 2 * (share if matrix.expert is not None else 1)
    return products * own.wide


def _further_forwards(settings: PruneSettings) -> int:
    """The forwards that sites add, which end early and make about one, and those of the dense model beside it."""
    by_site = settings.within == "site"
    return by_site + {"pruned": 0, "residual": 2, "dense": 4 if by_site else 1}[settings.targets]


def model_forward_seconds(skeleton: Skeleton, tokens: int, length: int = LENGTH) -> float:
    """About how long one forward of a whole model takes, its head included."""
    multiply, move = multiplying(skeleton, skeleton.dtype), moving(skeleton.device)
    length = min(length, skeleton.positions or length)
    size = default_batch_size(length, skeleton.device)
    tried = forwards(skeleton, length, size, multiply)
    blocks = sum(token + batch / (length * size) for token, batch in tried)
    head = skeleton.vocabulary_size * (skeleton.hidden_size * multiply + 12 * move)
    return tokens * (blocks + head)


def _share_of_experts(skeleton: Skeleton) -> float:
    """The share of a layer's experts that a token is routed to; 1 without experts."""
    experts = numbered_experts(skeleton.text_config) or 1
    return (getattr(skeleton.text_config, "num_experts_per_tok", None) or 1) / experts
