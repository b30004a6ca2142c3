"""The model card of a pruned checkpoint: `README.md` in the hub's format."""

import difflib
import functools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.calibration.text import bos_note
from secateur.core.patterns import NM, pattern_from_json
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE
from secateur.files.packed import is_packed
from secateur.files.reading import read_text
from secateur.files.writer import writing
from secateur.models.opening.classes import loader_of
from secateur.plans.allocated import told
from secateur.record.manifest import FILE_NAME, Manifest, cautions, order_line, read_manifest, sparsity
from secateur.record.publication import base_of, last_part, published_command

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from jinja2 import Environment

FEW = 4  # patterns of a kind that are listed one by one
USES = {False: "use.md", True: "use_packed.md"}  # how a checkpoint is loaded, by whether it is packed
COPIED = ("license", "license_name", "license_link", "language")  # of the card of the model that was pruned
START, END = "<!-- secateur: figures -->", "<!-- secateur: end of figures -->"

# Corpora under the names of the command line, as `_dataset` returns them.
DATASETS = {
    "c4": ("allenai/c4", "en", "validation"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
_WANDA = ("Sun et al., 2023", "A Simple and Effective Pruning Approach for Large Language Models", "2306.11695")
_GBLM = (
    "Das et al., 2023",
    "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
    "2311.04902",
)
_ALPS = (
    "Meng et al., 2024",
    "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    "2406.07831",
)
# Methods, refinements and allocations: who, title, number on arXiv. What is not here has no paper of its own.
PAPERS: dict[str, tuple[str, str, str | None]] = {
    "wanda": _WANDA,
    "wanda_variant": _WANDA,
    "ria": (
        "Zhang et al., ICLR 2024",
        "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        None,
    ),
    "gblm": _GBLM,
    "gblm_inverse": _GBLM,
    "gradient": _GBLM,
    "wanda_plus": (
        "Yang et al., 2025",
        "Wanda++: Pruning Large Language Models via Regional Gradients",
        "2503.04992",
    ),
    "pruner_zero": (
        "Dong et al., 2024",
        "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large Language Models",
        "2406.02924",
    ),
    "sparsegpt": (
        "Frantar and Alistarh, 2023",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "2301.00774",
    ),
    "magnitude_iterative": _WANDA,
    "wanda_iterative": _WANDA,
    "obs_update": _WANDA,
    "admm": ("Boža, 2024", "Fast and Effective Weight Update for Pruned Large Language Models", "2401.02938"),
    "alps": _ALPS,
    "least_squares": _ALPS,
    "owl": (
        "Yin et al., 2023",
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        "2310.05175",
    ),
    "dlp": ("Chen et al., 2025", "DLP: Dynamic Layerwise Pruning in Large Language Models", "2505.23807"),
    "alpha": (
        "Lu et al., 2024",
        "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large Language "
        "Models",
        "2410.10912",
    ),
    "swaps": ("arXiv, 2025", "SparseSwaps", "2512.10922"),
}


def write_card(folder: Path, manifest: Manifest, name: str) -> None:
    """Write `README.md` into the folder of a plain pruned checkpoint that will be called `name`."""
    from huggingface_hub import ModelCard

    with writing(folder / CARD_FILE):
        ModelCard(f"---\n{_data(manifest).to_yaml()}\n---\n\n{_text(manifest, name)}").save(folder / CARD_FILE)


def tell_use(folder: Path, *, packed: bool, name: str | None = None) -> None:
    """Let the card of a checkpoint that was packed, or unpacked, say how it is loaded under its `name`.

    Without a name it is the one in the card's title, so that unpacking brings back what packing changed. Text that
    somebody has changed stays as it is, and so does a card of another tool.
    """
    path = folder / CARD_FILE
    if not path.exists():
        return
    text = read_text(path)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    name = name or (title[1] if title else None)
    manifest = read_manifest(folder) if (folder / FILE_NAME).is_file() else None
    loading = _loading(None if manifest is None else manifest.source)
    found = next((found for form in USES.values() if (found := _use_of(form, loading).search(text))), None)
    if found is None or name is None:
        return
    use = _filled(USES[packed], name=name, **loading).rstrip("\n")
    with writing(path):
        path.write_text(f"{text[: found.start()]}{use}{text[found.end() :]}", encoding="utf-8")


def _use_of(form: str, loading: Mapping[str, str]) -> re.Pattern[str]:
    """What finds a text on the use of a checkpoint, whatever that is called."""
    first, *others = map(re.escape, _filled(form, name="\0", **loading).rstrip("\n").split("\0"))
    return re.compile(rf"{first}(?P<name>.*){'(?P=name)'.join(others)}")


def _loading(source: Mapping[str, Any] | None) -> dict[str, str]:
    """The classes of transformers that load a model and what reads its inputs."""
    loader = loader_of(str((source or {}).get("architecture")))
    if loader == "AutoModelForCausalLM":
        return {"loader": loader, "reader": "AutoTokenizer", "read": "tokenizer"}
    return {"loader": loader, "reader": "AutoProcessor", "read": "processor"}


def refresh_card(folder: Path, manifest: Manifest, evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Put figures into the card, in its text and its metadata, and leave everything else as it is.

    `evaluations` are mappings with a `kind` and a `result`; perplexities, agreements with the dense model and tasks
    count. A card that is missing is written. Returns False, and changes nothing, where a card has lost the two comments
    between which the figures belong. Raises `CheckpointError` for a card whose metadata cannot be read.
    """
    path = folder / CARD_FILE
    if not path.exists():
        write_card(folder, manifest, folder.resolve().name)
    card = _loaded(path)
    if not _fill_in(card, folder.resolve().name, evaluations):
        return False
    with writing(path):
        card.save(path)
    return True


def public_card(
    folder: Path, local: Manifest, public: Manifest, name: str, evaluations: Sequence[Mapping[str, Any]]
) -> str:
    """The card of a checkpoint as it is published as `name`, with figures; what people wrote into it stays.

    `public` is the published form of the manifest `local`. Raises `CheckpointError` for a card whose metadata cannot be
    read.
    """
    from huggingface_hub import ModelCard

    path, packed = folder / CARD_FILE, is_packed(folder)
    new = _text(public, name, packed=packed)
    made = ModelCard(f"---\n{_data(public).to_yaml()}\n---\n\n{new}")
    if path.exists():
        card = _loaded(path)
        used = _use_of(USES[packed], _loading(local.source)).search(card.text)
        old = _text(local, used["name"] if used else folder.resolve().name, packed=packed)
        card.text = _with_changes(card.text, old, new)
        data: Any = card.data
        known: Any = made.data
        for key, value in known.to_dict().items():
            # What somebody chose stays, but for the model's name and what the hub sorts models by.
            if key == "tags":
                data.tags = list(dict.fromkeys([*(data.get("tags") or []), *value]))
            elif key in ("base_model", "base_model_relation") or data.get(key) is None:
                setattr(data, key, value)
        if data.get("model_name"):
            data.model_name = name.rpartition("/")[2]
        made = card
    _fill_in(made, name.rpartition("/")[2], evaluations)
    return str(made)


def _with_changes(text: str, old: str, new: str) -> str:
    """A text with what differs between two others, wherever it has the lines of the old one."""
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    for kind, first, last, begin, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind in ("replace", "delete"):
            text = text.replace("".join(before[first:last]), "".join(after[begin:end]), 1)
    return text


def _loaded(path: Path) -> "ModelCard":
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        loaded: ModelCard = ModelCard.load(path)
        return loaded
    except (ValueError, YAMLError) as error:
        raise CheckpointError(
            f"{path}: its metadata cannot be read ({error}). Repair it, or delete the file and a new one is written."
        ) from None


def _fill_in(card: "ModelCard", name: str, evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Put figures into a card, in its text and its metadata; False, and no change, where the text has no place."""
    figures = [_figure(item) for item in evaluations if item["kind"] in ("perplexity", "agreement")]
    place = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if not place.search(card.text):
        return False
    tasks = [evaluation["result"] for evaluation in evaluations if evaluation["kind"] == "tasks"]
    if figures or tasks:
        data: Any = card.data
        card.text = place.sub(lambda _: _section(figures, tasks), card.text, count=1)
        data.model_name = data.get("model_name") or name
        data.eval_results = list(_eval_results(figures, tasks))
    return True


def papers(manifest: Manifest) -> list[tuple[str, str, str | None]]:
    """Authors, title and arXiv number of the papers on a method such as "wanda+least_squares" and the allocation."""
    allocation = str((manifest.settings.get("allocation") or {}).get("name"))
    return list(dict.fromkeys(PAPERS[part] for part in (*manifest.method.split("+"), allocation) if part in PAPERS))


def source_name(manifest: Manifest) -> str:
    """What the pruned model may be called in public: its hub id, or the last part of its path."""
    path = str(manifest.source.get("path") or "")
    return base_of(manifest) or last_part(path) or str(manifest.source.get("architecture"))


def patterns(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The patterns of matrices in words, each once; of many of a kind, the lowest and the highest."""
    kinds: dict[str, dict[float, None]] = {}
    for entry in entries:
        pattern = pattern_from_json(entry["pattern"])
        if isinstance(pattern, NM):
            kind, sparsity = f":{pattern.m}", float(pattern.n)
        else:
            kind, sparsity = entry["pattern"].get("per") or "", pattern.sparsity
        kinds.setdefault(kind, {})[sparsity] = None
    result = []
    for kind, found in kinds.items():
        listed = [[min(found), max(found)]] if len(found) > FEW else [[own] for own in found]
        result += [_pattern_text(kind, own) for own in listed]
    return result


def _pattern_text(kind: str, found: Sequence[float]) -> str:
    """Patterns of one kind in words: one, or from one to another."""
    if kind.startswith(":"):
        return " to ".join(f"{own:g}{kind}" for own in found)
    groups = {"row": ", each row alike", "matrix": ", anywhere in a matrix", "search": ", row thresholds searched"}
    return f"{' to '.join(f'{100 * own:.4g}' for own in found)} % unstructured{groups.get(kind, '')}"


def _data(manifest: Manifest) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    sources = (manifest.calibration or {}).get("sources", [])
    known = [dataset[0] for source in sources if (dataset := _dataset(str(source.get("corpus", ""))))]
    base = base_of(manifest)
    parts = manifest.method.split("+")
    return ModelCardData(
        base_model=base,
        # The hub knows adapter, merge, quantized and finetune: this is the one for other weights in the same layout.
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        # What an encoder is for is known to its own card alone.
        pipeline_tag="text-generation" if _loading(manifest.source)["loader"] == "AutoModelForCausalLM" else None,
        tags=list(dict.fromkeys(["pruned", "sparse", "sparsity", *_kinds(manifest), "secateur", *parts])),
        datasets=list(dict.fromkeys(known)) or None,
        **{key: manifest.source.get("card", {}).get(key) for key in COPIED},
    )


def _kinds(manifest: Manifest) -> list[str]:
    """What people look for in the hub's tags: `unstructured`, or a pattern such as `2:4`."""
    found = map(pattern_from_json, (entry["pattern"] for entry in manifest.matrices.values()))
    return list(dict.fromkeys(str(pattern) if isinstance(pattern, NM) else "unstructured" for pattern in found))


def _text(manifest: Manifest, name: str, *, packed: bool = False) -> str:
    from markupsafe import Markup

    base, commands = base_of(manifest), [section.get("command") for section in reversed(manifest.recoveries)]
    return _filled(
        "card.md",
        manifest=manifest,
        name=name,
        quoted=shlex.quote(name),
        use=_filled(USES[packed], name=name, **_loading(manifest.source)).rstrip("\n"),
        model=f"[{base}](https://huggingface.co/{base})" if base else f"`{source_name(manifest)}`",
        allocated=told(manifest.settings.get("allocation") or {}),
        cautions=cautions(manifest),
        order_line=order_line(manifest),
        figures=Markup(_section([], [])),  # nosec B704 # made by a template of ours, harmless by then
        # Of the pruning and of every recovery after it; what was done in Python has none.
        commands=[
            # In a block of code, where tags are text.
            Markup(shlex.join(published_command(command, manifest.source, base)))  # nosec B704
            for command in (manifest.command, *commands)
            if command is not None
        ],
        versions=", ".join(f"{library} {version}" for library, version in manifest.versions.items()),
        references=papers(manifest),
    )


def _section(figures: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]) -> str:
    """The text between the two comments, with them."""
    return f"{START}\n{_filled('figures.md', figures=figures, tasks=tasks)}{END}"


def _harmless(value: Any) -> Any:
    """A value of a card, in which nothing begins a tag of HTML."""
    from markupsafe import Markup

    return value.replace("<", "&lt;") if isinstance(value, str) and not isinstance(value, Markup) else value


def _filled(template: str, **values: Any) -> str:
    """A template of ours with its values."""
    return _templates().get_template(template).render(values)


@functools.cache
def _templates() -> "Environment":
    """Our templates, which jinja compiles once in a process."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(  # nosec B701 # Markdown, with the tags in names made harmless by `_harmless`
        loader=PackageLoader("secateur.record", "assets"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_harmless,
    )
    environment.filters |= {"corpus": _corpus_name, "number": _number, "patterns": patterns, "sparsity": sparsity}
    return environment


def _number(value: float | None, form: str, error: float | None = None) -> str:
    """A number in a format such as ".3f", with an error in the same one; empty for None."""
    return "" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _corpus_name(source: Mapping[str, Any]) -> str:
    corpus = str(source.get("corpus") or source.get("file") or "token ids")
    if "texts_ended" in source:
        prompts = f", answering {Path(source['prompts']['file']).name}" if "prompts" in source else ""
        return f"text that the model wrote itself{prompts}"
    return Path(corpus).name if source.get("file") and corpus not in DATASETS else corpus


def _figure(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a perplexity or an agreement, with the name of its text and the hub's names of it."""
    result, source = evaluation["result"], _first_source(evaluation)
    name = _corpus_name(source) if source.get("corpus") else str(result["data"])
    note = bos_note(result.get("provenance") or {})
    return {**result, "name": name, "dataset": hub_dataset(evaluation) or (name, None, None), "bos_note": note}


def perplexity_name(result: Mapping[str, Any]) -> str:
    """What a perplexity is of, so that two which differ on one text have two names."""
    note = bos_note(result.get("provenance") or {})
    return f"perplexity, {result['windows']} windows of {result['length']} tokens{note}"


def hub_dataset(evaluation: Mapping[str, Any]) -> tuple[str, str | None, str | None] | None:
    """The hub's data set that a text comes from: its id, configuration and split; None for any other text."""
    return _dataset(str(_first_source(evaluation).get("corpus") or ""))


def _dataset(corpus: str) -> tuple[str, str | None, str | None] | None:
    """A corpus as the hub knows it, or None for one that is elsewhere: data set, configuration, part for evaluation."""
    if corpus.startswith("hf:"):
        return corpus.removeprefix("hf:").split(":")[0], None, None
    return DATASETS.get(corpus)


def _first_source(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the text of an evaluation came from, or the first one of several."""
    source: Mapping[str, Any] = ((evaluation["result"].get("provenance") or {}).get("sources") or [{}])[0]
    return source


def _eval_results(figures: Iterable[Mapping[str, Any]], tasks: Iterable[Mapping[str, Any]]) -> "Iterator[EvalResult]":
    from huggingface_hub import EvalResult

    result = functools.partial(EvalResult, task_type="text-generation")
    for figure in figures:
        dataset, config, split = figure["dataset"]
        yield result(
            task_name="Language modelling",
            dataset_type=dataset,
            dataset_name=figure["name"],
            dataset_config=config,
            dataset_split=split,
            metric_type="perplexity",
            metric_name=perplexity_name(figure),
            metric_value=figure["perplexity"],
        )
    for task in tasks:
        for name, metric in task["metrics"].items():
            if metric["value"] is not None:
                yield result(
                    task_name="Evaluation harness",
                    dataset_type=task["task"],
                    dataset_name=task["task"],
                    metric_type=name,
                    metric_name=f"{name}, {task['documents']} documents",
                    metric_value=metric["value"],
                )
