"""Pruned models beside the dense one, on the same samples: what all such comparisons have in common."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from secateur.collect.model_windows import Samples
from secateur.collect.settings import DtypeSettings
from secateur.evaluate.perplexity import described
from secateur.evaluate.settings import AgreementSettings
from secateur.models.flow.stream import Stream, default_batch_size
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.runs.events import Progress, named
from secateur.runs.forward import after_the_last_block
from secateur.runs.journal import common_facts
from secateur.runs.options import shared
from secateur.runs.processes import Processes, shared_run


def beside_dense(
    settings: AgreementSettings,
    draw: Callable[[OpenedModel], Samples],
    compare: Callable[[Stream, Stream, Progress, Processes], dict[str, Any]],
    *,
    check: Callable[[OpenedModel, OpenedModel], None] = lambda dense, pruned: None,
    predicting: bool = True,
) -> list[dict[str, Any]]:
    """For each pruned model what `compare` makes of both streams after the last block, and what it was measured on.

    `draw` makes the samples for the dense model, and `check` may refuse a pruned one before it runs. The models run one
    after the other, each in the memory of one block; between them only the dense model's last hidden states are kept.
    """
    machine, progress = shared(settings, DtypeSettings), settings.tell
    with ExitStack() as stack:
        processes = stack.enter_context(shared_run())
        reference = open_model(settings.dense, **machine)
        stack.callback(reference.restore)
        cut = draw(reference)
        whole = cut.batches(settings.batch_size or default_batch_size(cut.length, reference.skeleton.device))
        processes.agree({**common_facts(reference), "dtype": str(reference.skeleton.dtype), "tokens": cut.digest})
        forward = partial(
            after_the_last_block,
            batches=processes.share(whole).batches,
            offload_states=settings.offload_states,
            predicting=predicting,
            length=cut.length,
        )
        dense = stack.enter_context(forward(reference.skeleton, progress=named(progress, "dense")))
        results = []
        for number, model in enumerate(settings.pruned):
            started = time.perf_counter()
            name = f"pruned {number + 1}" if len(settings.pruned) > 1 else "pruned"
            opened = open_model(model, **machine)
            try:
                check(reference, opened)
                with forward(opened.skeleton, progress=named(progress, name)) as pruned:
                    figures = compare(dense, pruned, named(progress, name), processes)
            finally:
                opened.restore()
            facts = {"model": str(opened.origin.get("path")), "seconds": time.perf_counter() - started}
            results.append({**facts, **described(cut, settings.data), **figures})
        return results
