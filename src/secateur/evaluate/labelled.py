"""What pruned models answer beside the dense one, and how often they are right where samples have labels."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.images import Images
from secateur.calibration.labels import Label, picture_labels
from secateur.calibration.named import NamedSamples
from secateur.collect.model_windows import Samples, evaluation_samples
from secateur.errors import CheckpointError, ModelStructureError, NumericalError
from secateur.evaluate.beside_dense import beside_dense
from secateur.evaluate.classes import class_numbers
from secateur.evaluate.perplexity import standard_error, without_nan
from secateur.evaluate.settings import AgreementSettings, TextSettings
from secateur.evaluate.similarity import Similarity, compare_states
from secateur.models.flow.inputs import LABELS
from secateur.models.flow.stream import Stream
from secateur.models.opening.classes import Task, task_of
from secateur.models.opening.opened import OpenedModel
from secateur.runs.events import Progress
from secateur.runs.options import shared, taking
from secateur.runs.processes import Processes
from secateur.shown import Shown, ShownList

# How many choices of a class count, by what the share of samples is called whose label is among them.
SHARES: Mapping[Task, Mapping[str, int]] = {
    "IMAGE_CLASSIFICATION": {"top1": 1, "top5": 5},
    "SEQUENCE_CLASSIFICATION": {"accuracy": 1},
    "AUDIO_CLASSIFICATION": {"accuracy": 1},
}
CHOICES = 5


@dataclass(frozen=True)
class Measured:
    """A figure of both models on the same labelled samples, and the pruned model's minus the dense one's.

    Errors are standard errors over samples, that of the difference over the differences of samples; NaN for a single
    one. `right_to_wrong` and `wrong_to_right` count the samples whose answer flipped, where it is right or wrong.
    """

    dense: float
    dense_error: float
    pruned: float
    pruned_error: float
    difference: float
    difference_error: float
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None


@dataclass(frozen=True, repr=False)
class Labelled(Shown):
    """A pruned model's answers beside the dense one's, on the same samples.

    `agreement` is the share of samples with the same answer, `kl` the mean of ``KL(dense || pruned)`` over the classes,
    in nats; errors are standard errors over samples, NaN for a single one. `figures` are those that need labels, by
    name: `top1` and `top5` for images, `accuracy` for texts and recordings, as shares of samples; empty without labels.
    `answers`, `answers_dense` and `labels` are numbers of classes, in the order in which the samples ran. `digest` is
    that of the samples.
    """

    model: str
    data: str
    task: Task
    samples: int
    classes: int
    agreement: float
    agreement_error: float
    kl: float
    kl_error: float
    figures: Mapping[str, Measured]
    answers: Sequence[int]
    answers_dense: Sequence[int]
    labels: Sequence[int] | None
    digest: str
    seconds: float
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All fields; errors are None for a single sample."""
        figures = {name: without_nan(asdict(figure)) for name, figure in self.figures.items()}
        return without_nan({**vars(self), "figures": figures})


@taking(AgreementSettings)
@torch.no_grad()
def labelled(settings: AgreementSettings) -> list[Labelled]:
    """What each pruned model answers beside the dense one, and how often both are right where there are labels.

    For models that choose between classes. Pictures of ``"images:FOLDER"`` have as labels the names of the folders that
    they lie in, or those of a table `labels.csv` or `metadata.csv` there; ``"labelled:FILE"`` is a table of texts, or
    pairs of texts, and their labels. Labels are names of the model's classes, or their numbers. The models run one
    after the other, each in the memory of one block.

    Raises `ModelStructureError` for models that choose between no classes, `CheckpointError` for models with different
    numbers of classes, `NumericalError` for outputs that are not finite, and `CalibrationError` for labels that the
    model does not know.
    """
    found = _beside(settings, states=False)
    return ShownList(own for _, own in found if own is not None)


@torch.no_grad()
def with_states(settings: AgreementSettings) -> tuple[list[Similarity], list[Labelled]]:
    """The similarity of each pruned model with the dense one, and its answers where it has some: of one pass."""
    found = _beside(settings, states=True)
    return [own for own, _ in found if own is not None], [own for _, own in found if own is not None]


def _beside(settings: AgreementSettings, *, states: bool) -> list[tuple[Similarity | None, Labelled | None]]:
    judge = _Judge(settings, needed=not states)

    def compare(*both: Any) -> dict[str, Any]:
        return {"answers": judge.compare(*both), "states": compare_states(*both) if states else None}

    made = []
    for figures in beside_dense(settings, judge.draw, compare, check=judge.check, predicting=False):
        answers, own = figures.pop("answers"), figures.pop("states")
        similar = None if own is None else Similarity(**{**figures, **own})
        facts = {name: figures[name] for name in ("model", "data", "digest", "seconds", "provenance")}
        said = None if answers is None else Labelled(**facts, samples=figures["windows"], **answers)
        made.append((similar, said))
    return made


@dataclass
class _Judge:
    """What the answers of models are judged by: known once the samples are drawn for the dense model."""

    settings: AgreementSettings
    needed: bool
    task: Task | None = None
    labels: list[int] | None = field(default=None)

    def draw(self, dense: OpenedModel) -> Samples:
        """The samples. Raises for labels that the model does not know, and for a model that is to answer and cannot."""
        model: Any = dense.skeleton.model
        self.task = chosen_task(model)
        if self.task is None and self.needed:
            raise ModelStructureError(
                f"{type(model).__name__}: chooses between no classes, so that there is nothing to be right or wrong. "
                "secateur.similarity compares the hidden states of such a model with the dense one's."
            )
        settings = self.settings
        samples = evaluation_samples(dense, settings.data, settings.tokenizer, **shared(settings, TextSettings))
        said = None if self.task is None else labels_of(samples)
        self.labels = None if said is None else class_numbers(model, said)
        return samples

    def check(self, dense: OpenedModel, pruned: OpenedModel) -> None:
        """Raise `CheckpointError` for models with different numbers of classes."""
        own, held = (_classes(opened.skeleton.model) for opened in (pruned, dense))
        if self.task is not None and own != held:
            raise CheckpointError(
                f"{pruned.origin.get('path')}: chooses between {own} classes, the dense model between {held}. They "
                "cannot be compared."
            )

    def compare(self, dense: Stream, pruned: Stream, progress: Progress, processes: Processes) -> dict[str, Any] | None:
        """The figures of a `Labelled`, from both models' logits; None where they choose between no classes."""
        if self.task is None:
            return None
        batches: list[Tensor] = []  # (first choices of the dense model, of the pruned one, divergence) of each sample
        most = min(CHOICES, _classes(dense.skeleton.model))
        for batch in range(len(dense.batches)):
            p, q = (_chances(stream.predictions(batch), who) for stream, who in ((dense, "dense"), (pruned, "pruned")))
            # A divergence is never negative; rounding can make it so by a little.
            divergence = (p.exp() * (p - q)).sum(-1, keepdim=True).clamp(min=0)
            first = [own.topk(most).indices.double() for own in (p, q)]
            batches.append(torch.cat([*first, divergence], dim=1).cpu())
        rows = torch.cat([own for part in processes.gather(batches) for own in part])
        first_dense, first_pruned = rows[:, :most].long(), rows[:, most:-1].long()
        same, divergence = (first_dense[:, 0] == first_pruned[:, 0]).double(), rows[:, -1]
        shares = {name: count for name, count in SHARES[self.task].items() if count < _classes(dense.skeleton.model)}
        figures = {}
        if self.labels is not None:
            wanted = torch.tensor(self.labels).unsqueeze(1)
            figures = {
                name: _measured(*((own[:, :count] == wanted).any(1) for own in (first_dense, first_pruned)))
                for name, count in shares.items()
            }
        return {
            "task": self.task,
            "classes": _classes(dense.skeleton.model),
            "agreement": float(same.mean()),
            "agreement_error": standard_error(same),
            "kl": float(divergence.mean()),
            "kl_error": standard_error(divergence),
            "figures": figures,
            "answers": first_pruned[:, 0].tolist(),
            "answers_dense": first_dense[:, 0].tolist(),
            "labels": self.labels,
        }


def _measured(dense: Tensor, pruned: Tensor) -> Measured:
    """The shares of samples for which the models are right."""
    own, reference = pruned.double(), dense.double()
    return Measured(
        dense=float(reference.mean()),
        dense_error=standard_error(reference),
        pruned=float(own.mean()),
        pruned_error=standard_error(own),
        difference=float((own - reference).mean()),
        difference_error=standard_error(own - reference),
        right_to_wrong=int((dense & ~pruned).sum()),
        wrong_to_right=int((pruned & ~dense).sum()),
    )


def _chances(logits: Tensor, who: str) -> Tensor:
    """The logarithms of the chances that a model gives its classes."""
    if not logits.isfinite().all():
        raise NumericalError(f"The logits of the {who} model are not finite; try --dtype float32.")
    return logits.double().log_softmax(-1)


def chosen_task(model: Any) -> Task | None:
    """What a model is for, where it chooses one of several classes; None for all others.

    A head with one output, or whose outputs do not exclude each other, makes no such choice.
    """
    several = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
    return task_of(type(model).__name__) if several and _classes(model) > 1 else None


def _classes(model: Any) -> int:
    return int(getattr(model.config, "num_labels", 0))


def labels_of(samples: Samples) -> list[Label] | None:
    """What the samples are labelled with, in their order; None where nothing says so."""
    if isinstance(samples, Images) and samples.folder is not None:
        return picture_labels(samples.folder, samples.files)
    if not isinstance(samples, NamedSamples):
        return None
    given = [sample[LABELS] for sample in samples.each if LABELS in sample]
    if given and len(given) == samples.samples and all(value.numel() == 1 for value in given):
        return [Label(str(int(value)), f"sample {number}") for number, value in enumerate(given)]
    return None if samples.labels is None else list(samples.labels)
