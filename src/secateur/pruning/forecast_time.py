"""How long a run will take: what it does, times the pace of this machine."""

import math
from dataclasses import dataclass, replace

import torch
from rich.filesize import decimal

from secateur.collect.model_windows import Foreseen
from secateur.core.needs import OutputGradients
from secateur.models.flow.stream import default_batch_size
from secateur.models.shape.skeleton import Skeleton
from secateur.plans.sensitivity import LEVELS
from secateur.pruning.allocating import SHARE
from secateur.pruning.forecast_memory import source_bytes
from secateur.pruning.named import allocation_of
from secateur.pruning.preparation import Prepared
from secateur.pruning.trial import choosing, digesting, forwards, moving, multiplying, skinny
from secateur.runs.events import seconds_text

DISK_BYTES_PER_SECOND = 500e6  # a plain SSD; no disk is measured, since that would take writing to it
AROUND_SECONDS = 1.0  # manifest, model card, and the libraries that write them
BLOCK_SECONDS = 0.5e-3  # of a block for one more token, beside its products: Python and many small operations
DRAWING_SECONDS = 12e-9  # of each word of the vocabulary, of which one is drawn
BACK_FORWARDS = 3.0  # of a pass that saves states, and goes back through the blocks without gradients of weights
LENGTH = 512  # of windows where none is known


@dataclass(frozen=True)
class RunSeconds:
    """About how long the parts of a run take. Reading and writing go on beside the others."""

    forwards: float
    products: float  # of statistics
    solving: float
    hashing_model: float  # where gradients are taken first
    converting: float
    hashing: float
    disk: float

    @property
    def total(self) -> float:
        """Of the whole run."""
        # Reading, hashing and writing go on beside the rest, and take a part of the cores; a block is read before them.
        busy = self.forwards + self.products + self.solving + self.hashing_model + self.converting
        busy += self.hashing / max(1, torch.get_num_threads())
        return max(busy, self.disk + self.hashing / 2) + AROUND_SECONDS

    def shared(self, samples: float, matrices: float) -> "RunSeconds":
        """Where a process has these shares of the samples, and of the work of solving."""
        forwards, products = self.forwards * samples, self.products * samples
        return replace(self, forwards=forwards, products=products, solving=self.solving * matrices)


def run_seconds(ready: Prepared, passes: int) -> RunSeconds:
    """About how long a prepared run takes from here on.

    Two forwards where samples run through the blocks, or one site by site, and those that evidence takes; choosing and
    solving; reading, converting, hashing and writing.
    """
    skeleton, method = ready.opened.skeleton, ready.method
    extent = ready.extent
    cost = ready.evidence.cost(extent)
    planned = extent.matrices
    last = max(matrix.block for matrix in planned)
    multiply, move, digest = multiplying(skeleton, skeleton.dtype), moving(skeleton.device), digesting()
    wide = torch.promote_types(skeleton.dtype, torch.float32)  # the dtype of Gram matrices
    multiply_wide = multiply if wide == skeleton.dtype else multiplying(skeleton, wide)
    batches, once = math.ceil(extent.samples / extent.chosen_batch_size), 0.0
    if extent.length:
        tried = forwards(skeleton, extent.length, extent.chosen_batch_size, multiply)
        once = sum(token * extent.tokens + batch * batches for token, batch in tried[: last + 1])
    passes_of_states = 2.0
    if extent.by_site:  # one sample twice, and all of them twice more where the inputs of experts are looked at
        passes_of_states = 1.0 + 1 / max(1, extent.samples) + 2.0 * any(matrix.routed for matrix in planned)
    passed = passes_of_states if ready.evidence.forwards else 0.0
    bytes_ = source_bytes(skeleton, skeleton.source.names)
    weights = sum(math.prod(matrix.shape) for matrix in planned)
    products = sum(method.products * math.prod(matrix.shape) * matrix.shape[1] for matrix in planned)
    return RunSeconds(
        forwards=(passed + cost.forwards) * once + cost.computing * multiply + cost.moved * move,
        products=cost.products * multiply_wide,
        solving=choosing(skeleton, method, ready.plan[planned[0].name]) * weights + products * multiply_wide,
        hashing_model=digest * cost.hashings * bytes_,
        converting=move * 3 * bytes_ * passes,
        hashing=digest * 2 * bytes_,
        disk=bytes_ * (1 if skeleton.resident else 2) / DISK_BYTES_PER_SECOND,
    )


def allocating_seconds(ready: Prepared) -> float:
    """About how long the allocation of a dry run would take, before the run itself."""
    skeleton, extent = ready.opened.skeleton, ready.extent
    samples, length = ready.foreseen.samples, ready.foreseen.length
    allocation = allocation_of(ready.settings.allocation, ready.settings.allocation_option)
    multiply = multiplying(skeleton, torch.promote_types(skeleton.dtype, torch.float32))
    size = ready.settings.batch_size or default_batch_size(length, skeleton.device)
    tried = forwards(skeleton, length, size, multiply)
    once = sum(token * samples * length + batch * samples / size for token, batch in tried)
    passes, products = 1.0, 0.0
    if OutputGradients in allocation.needs:
        passes += BACK_FORWARDS
        inputs = {(matrix.block, matrix.site): matrix.shape[1] for matrix in extent.matrices}
        products += sum(width * width for width in inputs.values()) * samples * length
        products += sum(LEVELS * rows * width * width for rows, width in (m.shape for m in extent.matrices))
    held_out = max(1, samples // SHARE) / samples
    return ((1 - held_out) * passes + 2 * held_out) * once + products * multiply


def allocating_note(ready: Prepared, seconds: float) -> str:
    """What is said of it."""
    return (
        f"The plan of {ready.settings.allocation} is made first, in about {seconds_text(seconds)}. It is not made "
        "here: all figures are those of a uniform plan."
    )


def forward_seconds(skeleton: Skeleton, tokens: int) -> float:
    """About how long one forward of a whole model takes, its head included."""
    multiply, move = multiplying(skeleton, skeleton.dtype), moving(skeleton.device)
    length = min(LENGTH, skeleton.positions or LENGTH)
    size = default_batch_size(length, skeleton.device)
    tried = forwards(skeleton, length, size, multiply)
    blocks = sum(token + batch / (length * size) for token, batch in tried)
    head = skeleton.vocabulary_size * (skeleton.hidden_size * multiply + 12 * move)
    return tokens * (blocks + head)


def writing_seconds(skeleton: Skeleton, foreseen: Foreseen) -> float:
    """About how long the model takes to write its own calibration text, token by token, and to be loaded for it."""
    weights = sum(math.prod(matrix.shape) for matrix in skeleton.matrices if matrix.expert in (None, 0))
    weights += skeleton.vocabulary_size * skeleton.hidden_size
    steps = sum(own.length * math.ceil(own.samples / foreseen.at_once) for own in foreseen.to_write)
    drawing = DRAWING_SECONDS * skeleton.vocabulary_size * foreseen.at_once
    loading = 0.0 if skeleton.resident else source_bytes(skeleton, skeleton.source.names) / DISK_BYTES_PER_SECOND
    each = skinny(skeleton, foreseen.at_once) * weights + BLOCK_SECONDS * len(skeleton.blocks) + drawing
    return steps * each + loading


def writing_note(skeleton: Skeleton, foreseen: Foreseen, seconds: float) -> str:
    """What is said of it: tokens, time, and the memory of the whole model."""
    tokens = sum(own.tokens for own in foreseen.to_write)
    names = ", ".join(dict.fromkeys(own.spec for own in foreseen.to_write))
    held = skeleton.dtype.itemsize * sum(math.prod(skeleton.source.shape(name)) for name in skeleton.source.names)
    return (
        f"{names}: the model first writes {tokens:,} tokens, in about {seconds_text(seconds)}, for which all of it is "
        f"in memory ({decimal(held)}). The text is kept for later runs."
    )
