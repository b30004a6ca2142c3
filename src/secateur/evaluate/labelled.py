"""What pruned models answer beside the dense one, and how often they are right where samples have labels."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.audio import audio_of
from secateur.calibration.images import Images
from secateur.calibration.labels import Label, file_labels, texts_of
from secateur.calibration.named import NamedSamples
from secateur.collect.model_windows import Samples, evaluation_samples
from secateur.collect.settings import DtypeSettings
from secateur.core.batch import LABELS
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, NumericalError
from secateur.evaluate.beside_dense import beside_dense
from secateur.evaluate.classes import class_numbers
from secateur.evaluate.measured import Measured, share_right
from secateur.evaluate.perplexity import described, standard_error, without_nan
from secateur.evaluate.settings import AgreementSettings, TextSettings
from secateur.evaluate.similarity import Similarity, compare_states
from secateur.evaluate.written import JUDGED, check_package, judged_by, normaliser, text_figures, text_of, write
from secateur.models.flow.stream import Stream
from secateur.models.opening.classes import Task, task_of
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.runs.events import Progress, named
from secateur.runs.journal import common_facts
from secateur.runs.options import shared, taking
from secateur.runs.processes import Processes, shared_run
from secateur.shown import Shown, ShownList

# How many choices of a class count, by what the share of samples is called whose label is among them.
SHARES: Mapping[Task, Mapping[str, int]] = {
    "IMAGE_CLASSIFICATION": {"top1": 1, "top5": 5},
    "SEQUENCE_CLASSIFICATION": {"accuracy": 1},
    "AUDIO_CLASSIFICATION": {"accuracy": 1},
}
CHOICES = 5
AT_ONCE = 8  # samples that a model writes for, where nobody says how many


@dataclass(frozen=True, repr=False)
class Labelled(Shown):
    """A pruned model's answers beside the dense one's, on the same samples.

    An answer is a class, or a text. `agreement` is the share of samples with the same answer, `kl` the mean of
    ``KL(dense || pruned)`` in nats over the `classes` (with CTC over the tokens of a place; None for what `generate`
    writes); errors are standard errors over samples, NaN for a single one. `figures` are those that need labels, by
    name: the shares `top1` and `top5` for images, `accuracy` for texts and recordings, or `wer`, the word error rate
    of speech, or `chrf`, from 0 to 100; empty without labels. `answers`, `answers_dense` and `labels` are numbers of
    classes, or texts as they are compared, in the order in which the samples ran. `digest` is that of the samples.
    """

    model: str
    data: str
    task: Task
    samples: int
    classes: int | None
    agreement: float
    agreement_error: float
    kl: float | None
    kl_error: float | None
    figures: Mapping[str, Measured]
    answers: Sequence[int] | Sequence[str]
    answers_dense: Sequence[int] | Sequence[str]
    labels: Sequence[int] | Sequence[str] | None
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

    For models that choose between classes, and those that write texts. Pictures of ``"images:FOLDER"`` have as labels
    the names of the folders that they lie in, or those of a table `labels.csv` or `metadata.csv` there;
    ``"labelled:FILE"`` is a table of texts, or pairs of texts, and their labels: names of the model's classes, or their
    numbers, or the texts that should be written. Of ``"audio:FOLDER"`` they are the transcripts. The models run one
    after the other, each in the memory of one block, or for `generate` as a whole.

    Raises `ModelStructureError` for models that do neither, `CheckpointError` for models with different numbers of
    classes, `NumericalError` for outputs that are not finite, and `CalibrationError` for labels that the model does not
    know, and where the package is missing that judges texts.
    """
    if by_generation(settings):
        return _written(settings)
    found = _beside(settings, states=False)
    return ShownList(own for _, own in found if own is not None)


@torch.no_grad()
def with_states(settings: AgreementSettings) -> tuple[list[Similarity], list[Labelled]]:
    """The similarity of each pruned model with the dense one, and its answers where it has some: of one pass."""
    found = _beside(settings, states=True)
    return [own for own, _ in found if own is not None], [own for _, own in found if own is not None]


def by_generation(settings: AgreementSettings) -> bool:
    """Whether the dense model answers by `generate`, to recordings or labelled texts; no weights are read for it."""
    asked = audio_of(settings.data) is not None or texts_of(settings.data) is not None
    if not asked or str(settings.dense).endswith(".gguf"):  # which are decoders
        return False
    opened = open_model(settings.dense, **shared(settings, DtypeSettings))
    try:
        return answering_task(opened.skeleton.model) in ("SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM")
    finally:
        opened.restore()


def answering_task(model: Any) -> Task | None:
    """What a model is for, where its answers can be right or wrong; None for all others.

    A head with one output, or whose outputs do not exclude each other, makes no choice between classes. One that reads
    the states of all blocks is not seen as it is, where only those after the last are at hand.
    """
    if getattr(model.config, "use_weighted_layer_sum", False):
        return None
    task = task_of(type(model).__name__)
    if task in SHARES:
        several = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
        return task if several and _classes(model) > 1 else None
    return task


def _classes(model: Any) -> int:
    """How many there are to choose from: classes, or with CTC tokens."""
    name = "vocab_size" if task_of(type(model).__name__) == "CTC" else "num_labels"
    return int(getattr(model.config, name, 0))


def labels_of(samples: Samples) -> list[Label] | None:
    """What the samples are labelled with, in their order; None where nothing says so."""
    if isinstance(samples, Images) and samples.folder is not None:
        return file_labels(samples.folder, samples.files)
    if not isinstance(samples, NamedSamples):
        return None
    if samples.labels is not None:
        return list(samples.labels)
    given = [sample[LABELS] for sample in samples.each if LABELS in sample]
    if given and len(given) == samples.samples and all(value.numel() == 1 for value in given):
        return [Label(str(int(value)), f"sample {number}") for number, value in enumerate(given)]
    return None


class _Judge:
    """What the answers of models are judged by: known once the samples are drawn for the dense model."""

    def __init__(self, settings: AgreementSettings, *, needed: bool) -> None:
        self.settings, self.needed = settings, needed
        self.task: Task | None = None
        self.labels: list[Label] | None = None
        self.numbers: list[int] | None = None
        self.tokenizer: Any = None
        self.model: Any = None

    def draw(self, dense: OpenedModel) -> Samples:
        """The samples. Raises for labels that the model does not know, and for a model that is to answer and cannot."""
        self.model = model = dense.skeleton.model
        self.task = answering_task(model)
        if self.task in JUDGED:
            self.tokenizer = self.settings.tokenizer or dense.load_tokenizer()
            if self.tokenizer is None and self.needed:
                raise CalibrationError(f"{type(model).__name__}: to read what it writes needs its tokenizer.")
            self.task = None if self.tokenizer is None else self.task
        if self.task is None and self.needed:
            raise ModelStructureError(
                f"{type(model).__name__}: chooses between no classes and writes nothing that can be right or wrong. "
                "secateur.similarity compares the hidden states of such a model with the dense one's."
            )
        settings = self.settings
        samples = evaluation_samples(dense, settings.data, settings.tokenizer, **shared(settings, TextSettings))
        self.labels = None if self.task is None else labels_of(samples)
        if self.labels is None:
            return samples
        if self.task in JUDGED:
            check_package(self.task)
        else:
            self.numbers = class_numbers(model, self.labels)
        return samples

    def check(self, dense: OpenedModel, pruned: OpenedModel) -> None:
        """Raise `CheckpointError` for models with different numbers of classes."""
        own, held = (_classes(opened.skeleton.model) for opened in (pruned, dense))
        if self.task is not None and own != held:
            raise CheckpointError(
                f"{pruned.origin.get('path')}: chooses between {own} classes, the dense model between {held}. They "
                "cannot be compared."
            )

    def texts(self, dense: Sequence[str], pruned: Sequence[str]) -> dict[str, Any]:
        """The figures of a `Labelled` for texts that two models have written."""
        assert self.task is not None
        name, plain = normaliser(self.model, self.tokenizer)
        found = text_figures(self.task, dense, pruned, self.labels, plain)
        same = found.pop("same")
        errors = {"agreement": float(same.mean()), "agreement_error": standard_error(same)}
        how = {"judged_by": judged_by(self.task, name)} if self.labels is not None else {}
        return {"task": self.task, "classes": None, "kl": None, "kl_error": None, **errors, **found, "how": how}


def _beside(settings: AgreementSettings, *, states: bool) -> list[tuple[Similarity | None, Labelled | None]]:
    judge = _Judge(settings, needed=not states)

    def compare(*both: Any) -> dict[str, Any]:
        answers = None if judge.task not in COMPARED else COMPARED[judge.task](judge, *both)
        return {"answers": answers, "states": compare_states(*both) if states else None}

    made = []
    for figures in beside_dense(settings, judge.draw, compare, check=judge.check, predicting=False):
        answers, own = figures.pop("answers"), figures.pop("states")
        similar = None if own is None else Similarity(**{**figures, **own})
        made.append((similar, None if answers is None else _made(figures, answers)))
    return made


def _made(facts: Mapping[str, Any], answers: Mapping[str, Any]) -> Labelled:
    """What a model answers, with what it was measured on."""
    own = dict(answers)
    provenance = {**facts["provenance"], **own.pop("how", {})}
    shown = {name: facts[name] for name in ("model", "data", "digest", "seconds")}
    return Labelled(**shown, **own, samples=facts["windows"], provenance=provenance)


# By what a model predicts for each sample after its last block


def _choices(judge: _Judge, dense: Stream, pruned: Stream, progress: Progress, processes: Processes) -> dict[str, Any]:
    """The figures of a `Labelled` for models that choose one class for each sample."""
    assert judge.task is not None
    batches: list[Tensor] = []  # (first choices of the dense model, of the pruned one, divergence) of each sample
    classes = _classes(dense.skeleton.model)
    most = min(CHOICES, classes)
    for batch in range(len(dense.batches)):
        p, q = _chances(dense, pruned, batch)
        first = [own.topk(most).indices.double() for own in (p, q)]
        batches.append(torch.cat([*first, _divergence(p, q).unsqueeze(1)], dim=1).cpu())
    rows = torch.cat([own for part in processes.gather(batches) for own in part])
    first_dense, first_pruned = rows[:, :most].long(), rows[:, most:-1].long()
    same, divergence = (first_dense[:, 0] == first_pruned[:, 0]).double(), rows[:, -1]
    figures = {}
    if judge.numbers is not None:
        wanted = torch.tensor(judge.numbers).unsqueeze(1)
        figures = {
            name: share_right(*((own[:, :count] == wanted).any(1) for own in (first_dense, first_pruned)))
            for name, count in SHARES[judge.task].items()
            if count < classes
        }
    return {
        "task": judge.task,
        "classes": classes,
        "agreement": float(same.mean()),
        "agreement_error": standard_error(same),
        "kl": float(divergence.mean()),
        "kl_error": standard_error(divergence),
        "figures": figures,
        "answers": first_pruned[:, 0].tolist(),
        "answers_dense": first_dense[:, 0].tolist(),
        "labels": judge.numbers,
    }


def _heard(judge: _Judge, dense: Stream, pruned: Stream, progress: Progress, processes: Processes) -> dict[str, Any]:
    """The figures of a `Labelled` for models that choose one token for each place (CTC), of which a text is made."""
    found: list[tuple[str, str, float]] = []  # (text of the dense model, of the pruned one, divergence) of each sample
    for batch in range(len(dense.batches)):
        p, q = _chances(dense, pruned, batch)
        texts = [[text_of(judge.tokenizer, ids) for ids in own.argmax(-1).tolist()] for own in (p, q)]
        found += zip(*texts, _divergence(p, q).mean(1).tolist(), strict=True)
    each = [own for part in processes.gather(found) for own in part]
    divergence = torch.tensor([own[2] for own in each], dtype=torch.float64)
    answers = judge.texts([own[0] for own in each], [own[1] for own in each])
    return {
        **answers,
        "classes": _classes(dense.skeleton.model),
        "kl": float(divergence.mean()),
        "kl_error": standard_error(divergence),
    }


def _chances(dense: Stream, pruned: Stream, batch: int) -> list[Tensor]:
    """The logarithms of the chances that both models give to what they choose from."""
    found = []
    for who, stream in (("dense", dense), ("pruned", pruned)):
        logits = stream.predictions(batch)
        if not logits.isfinite().all():
            raise NumericalError(f"The logits of the {who} model are not finite; try --dtype float32.")
        found.append(logits.double().log_softmax(-1))
    return found


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    # It is never negative; rounding can make it so by a little.
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


COMPARED: Mapping[Task | None, Callable[..., dict[str, Any]]] = {
    "IMAGE_CLASSIFICATION": _choices,
    "SEQUENCE_CLASSIFICATION": _choices,
    "AUDIO_CLASSIFICATION": _choices,
    "CTC": _heard,
}


# By what it writes, with the whole model in memory


def _written(settings: AgreementSettings) -> list[Labelled]:
    judge, machine = _Judge(settings, needed=True), shared(settings, DtypeSettings)
    with ExitStack() as stack:
        processes = stack.enter_context(shared_run())
        reference = open_model(settings.dense, **machine)
        stack.callback(reference.restore)
        samples = judge.draw(reference)
        whole: Any = samples.batches(settings.batch_size or AT_ONCE)
        processes.agree({**common_facts(reference), "dtype": str(reference.skeleton.dtype), "tokens": samples.digest})
        batches: Any = processes.share(whole).batches

        def texts(opened: OpenedModel, name: str) -> list[str]:
            own = write(opened, judge.tokenizer, batches, named(settings.tell, name))
            return [text for part in processes.gather(own) for text in part]

        dense = texts(reference, "dense")
        made = []
        for number, model in enumerate(settings.pruned):
            started = time.perf_counter()
            opened = open_model(model, **machine)
            try:
                judge.check(reference, opened)
                found = texts(opened, f"pruned {number + 1}" if len(settings.pruned) > 1 else "pruned")
            finally:
                opened.restore()
            facts = {"model": str(opened.origin.get("path")), "seconds": time.perf_counter() - started}
            made.append(_made({**facts, **described(samples, settings.data)}, judge.texts(dense, found)))
    return ShownList(made)
