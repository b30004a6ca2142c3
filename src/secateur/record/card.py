"""The model card of a pruned checkpoint: `README.md` in the hub's format."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.core.patterns import NM, pattern_from_json
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE
from secateur.files.writer import writing
from secateur.record.manifest import Manifest, cautions

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

START, END = "<!-- secateur: figures -->", "<!-- secateur: end of figures -->"

# Corpora under the names of the command line, as the hub knows them: data set, configuration, part for evaluation.
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
_SPARSEGPT = (
    "Frantar and Alistarh, 2023",
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "2301.00774",
)
_ALPS = (
    "Meng et al., 2024",
    "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    "2406.07831",
)
# Methods and refinements: who, title, number on arXiv. What is not here has no paper of its own.
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
    "sparsegpt": _SPARSEGPT,
    "magnitude_iterative": _WANDA,
    "wanda_iterative": _WANDA,
    "obs_update": _WANDA,
    "admm": ("Boža, 2024", "Fast and Effective Weight Update for Pruned Large Language Models", "2401.02938"),
    "alps": _ALPS,
    "least_squares": _ALPS,
    "swaps": ("arXiv, 2025", "SparseSwaps", "2512.10922"),
}


RECOVERIES = {
    "full": "The kept weights were trained; the zeros stayed",
    "block": "The kept weights were tuned block by block to the outputs of the dense model; the zeros stayed",
    "merge": "An adapter was merged into the weights",
}


def write_card(folder: Path, manifest: Manifest, name: str) -> None:
    """Write `README.md` into the folder of a pruned checkpoint that will be called `name`."""
    from huggingface_hub import ModelCard

    data = _data(manifest)
    with writing(folder / CARD_FILE):
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(manifest, name)}").save(folder / CARD_FILE)


def refresh_card(folder: Path, manifest: Manifest, evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Put figures into the card, in its text and its metadata, and leave everything else as it is.

    `evaluations` are mappings with a `kind` and a `result`; perplexities, agreements with the dense model and tasks
    count. A card that is missing is written. Returns False, and changes nothing, where a card has lost the two comments
    between which the figures belong. Raises `CheckpointError` for a card whose metadata cannot be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = folder / CARD_FILE
    if not path.exists():
        write_card(folder, manifest, folder.resolve().name)
    try:
        card = ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise CheckpointError(
            f"{path}: its metadata cannot be read ({error}). Repair it, or delete the file to have it written anew."
        ) from None
    figures = [figure for figure in map(_figure, evaluations) if figure is not None]
    place = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if not place.search(card.text):
        return False
    tasks = [evaluation["result"] for evaluation in evaluations if evaluation["kind"] == "tasks"]
    card.text = place.sub(lambda _: _section(figures, tasks), card.text, count=1)
    if figures or tasks:
        card.data.model_name = card.data.get("model_name") or folder.resolve().name
        card.data.eval_results = [*map(_result, figures), *(row for task in tasks for row in _task_results(task))]
    with writing(path):
        card.save(path)
    return True


def base_model(source: Mapping[str, Any]) -> str | None:
    """The hub id of the model that was pruned, where it is known: never a path."""
    path = str(source.get("path") or "")
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", path)
    name = cached[1].replace("--", "/") if cached else path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return name if is_hub_id and (cached or not Path(name).exists()) else None


def papers(method: str) -> list[tuple[str, str, str | None]]:
    """Authors, title and arXiv number of the papers on a method such as "wanda+least_squares", each once."""
    return list(dict.fromkeys(PAPERS[part] for part in method.split("+") if part in PAPERS))


def source_name(manifest: Manifest) -> str:
    """What the pruned model may be called in public: its hub id, or the last part of its path."""
    path = str(manifest.source.get("path") or "")
    return base_model(manifest.source) or Path(path).name or str(manifest.source.get("architecture"))


def patterns(manifest: Manifest) -> list[str]:
    """The patterns of the plan in words, each once."""
    return list(dict.fromkeys(_pattern_text(entry["pattern"]) for entry in manifest.matrices.values()))


def _pattern_text(value: Mapping[str, Any]) -> str:
    pattern = pattern_from_json(value)
    if isinstance(pattern, NM):
        return str(pattern)
    groups = {"row": ", each row alike", "matrix": ", anywhere in a matrix", "search": ", row thresholds searched"}
    return f"{100 * pattern.sparsity:.4g} % unstructured{groups.get(value.get('per') or '', '')}"


def _data(manifest: Manifest) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    sources = (manifest.calibration or {}).get("sources", [])
    known = [
        DATASETS[corpus][0] if corpus in DATASETS else corpus.removeprefix("hf:").split(":")[0]
        for corpus in (str(source.get("corpus", "")) for source in sources)
        if corpus in DATASETS or corpus.startswith("hf:")
    ]
    base = base_model(manifest.source)
    parts = manifest.method.split("+")
    given = {key: manifest.source.get("card", {}).get(key) for key in ("license", "license_name", "license_link")}
    return ModelCardData(
        base_model=base,
        # The hub knows adapter, merge, quantized and finetune: this is the one for other weights in the same layout.
        base_model_relation="finetune" if base else None,
        language=manifest.source.get("card", {}).get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["pruned", "sparse", "secateur", *parts])),
        datasets=list(dict.fromkeys(known)) or None,
        **given,
    )


def _text(manifest: Manifest, name: str) -> str:
    base, source, totals = base_model(manifest.source), source_name(manifest), manifest.totals
    named = f"[{base}](https://huggingface.co/{base})" if base else f"`{source}`"
    references = papers(manifest.method)
    paragraphs = [
        f"# {name}",
        f"{named}, pruned with {manifest.method} by Secateur "
        f"{manifest.versions['secateur']}: {totals['zeros']:,} of {totals['weights']:,} planned weights are zero "
        f"({100 * totals['sparsity']:.2f} %).",
        "## Sparsity\n\n" + "\n\n".join([_kinds_table(manifest), *cautions(manifest)]),
        "## Calibration\n\n" + _calibration(manifest),
        *_recovered(manifest),
        f"## Figures\n\n{_section([])}",
        "## Use\n\nIt loads like any other checkpoint:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        "It is **not smaller and not faster by itself**: zeros are stored and multiplied like other numbers, until "
        "something makes use of them. Fine-tuning fills them unless the mask is held; so does merging an adapter.\n\n"
        "A pruned model has lost some of what the dense one could do, and perplexity does not show all of it. Measure "
        "what you use it for.",
        "## How it was made\n\n" + _recipe(manifest),
        "## How to check it\n\n"
        "`secateur.json` records what was asked and done, with a sha256 of every tensor. From the files alone:\n\n"
        f"```\nsecateur verify {shlex.quote(name)}\n```",
    ]
    if references:
        cited = [
            f"- {who}: *{title}*" + (f", [arXiv:{number}](https://arxiv.org/abs/{number})" if number else "")
            for who, title, number in references
        ]
        paragraphs.append("## Method\n\n" + "\n".join(cited))
    if "license" not in manifest.source.get("card", {}):
        paragraphs.append("## Licence\n\nThat of the base model; its card did not state one in a form that is copied.")
    return "\n\n".join(paragraphs) + "\n"


def _recovered(manifest: Manifest) -> list[str]:
    """The section on what was done after pruning, in order; empty where nothing was."""
    done: list[str] = []
    for section in reversed(manifest.recoveries):
        data = section.get("data") or section.get("calibration") or {}
        text = ", ".join(_corpus_name(source) for source in data.get("sources", [data] if data else []))
        done.append(f"- {RECOVERIES[section['method']]}" + (f", on {text}" if text else ""))
    return ["## After pruning\n\n" + "\n".join(done)] if done else []


def _kinds_table(manifest: Manifest) -> str:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for entry in manifest.matrices.values():
        kinds.setdefault(entry["kind"], []).append(entry)
    lines = ["| matrices | count | pattern | sparsity |", "|---|---:|---|---:|"]
    for kind, entries in kinds.items():
        zeros = sum(entry["zeros"] for entry in entries)
        weights = sum(entry["shape"][0] * entry["shape"][1] for entry in entries)
        found = list(dict.fromkeys(_pattern_text(entry["pattern"]) for entry in entries))
        lines.append(f"| `{kind}` | {len(entries)} | {'; '.join(found)} | {zeros / weights:.4f} |")
    if manifest.recovery is None:
        rest = "Everything else (embeddings, head, norms, biases)"
    else:
        rest = "`secateur.json` lists what was trained; everything else"
    return "\n".join(lines) + f"\n\n{rest} is that of the base model, {_exactness(manifest)}."


def _exactness(manifest: Manifest) -> str:
    if manifest.source.get("kind") == "gguf":
        return "dequantised before it was pruned"
    if "dequantised" in manifest.source:
        return f"with its quantised weights dequantised to {manifest.source['dequantised']['dtype']}"
    return "byte for byte"


def _calibration(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return "None: this method looks at the weights alone."
    corpora = [_corpus_name(source) for source in calibration.get("sources", [])]
    return (
        f"{calibration.get('samples')} windows of {calibration.get('length')} tokens"
        + (f" of {', '.join(corpora)}" if corpora else "")
        + (f", seed {calibration['seed']}" if calibration.get("seed") is not None else "")
        + f"; sha256 of the tokens `{calibration['digest'][:16]}`."
    )


def _corpus_name(source: Mapping[str, Any]) -> str:
    corpus = str(source.get("corpus") or source.get("file") or "token ids")
    return Path(corpus).name if source.get("file") and corpus not in DATASETS else corpus


def _recipe(manifest: Manifest) -> str:
    """The commands of the pruning and of every recovery after it; what was done in Python has none."""
    commands = [section.get("command") for section in reversed(manifest.recoveries)]
    known = [shlex.join(command) for command in (manifest.command, *commands) if command is not None]
    made = "```\n" + "\n".join(known) + "\n```\n\n" if known else ""
    if len(known) <= len(commands):
        made += ("The rest was done" if known else "It was made") + " in Python; `secateur.json` has every setting. "
    return (
        made + "Versions: " + ", ".join(f"{library} {version}" for library, version in manifest.versions.items()) + "."
    )


def _figure(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the card says of one evaluation, or None for a kind that it says nothing of."""
    result = evaluation["result"]
    if evaluation["kind"] not in ("perplexity", "agreement"):
        return None
    sources = (result.get("provenance") or {}).get("sources") or [{}]
    corpus = str(sources[0].get("corpus") or "")
    name = _corpus_name(sources[0]) if corpus else str(result["data"])
    known = DATASETS.get(corpus)
    return {
        "name": name,
        "dataset": known
        or (corpus.removeprefix("hf:").split(":")[0] if corpus.startswith("hf:") else name, None, None),
        "windows": result["windows"],
        "length": result["length"],
        "perplexity": result["perplexity"],
        "dense": result.get("perplexity_dense"),
        "error": result.get("perplexity_error"),
        "kl": result.get("kl"),
        "top1": result.get("top1"),
    }


def _section(figures: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text between the two comments, with them."""
    parts = [*([_figures_table(figures)] if figures else []), *([_tasks_table(tasks)] if tasks else [])]
    body = "\n\n".join(parts) or "None recorded yet: `secateur eval` and then `secateur report` write them here."
    return f"{START}\n{body}\n{END}"


def _figures_table(figures: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| text | windows | perplexity, dense | perplexity, pruned | KL per token | same first choice |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for figure in figures:
        error = f" ± {figure['error']:.3f}" if figure["error"] is not None else ""
        cells = [
            figure["name"],
            f"{figure['windows']} x {figure['length']}",
            _number(figure["dense"], ".3f"),
            f"{figure['perplexity']:.3f}{error}",
            _number(figure["kl"], ".4f"),
            _number(figure["top1"], ".1%"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tasks_table(tasks: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| task | shots | documents | metric | value |", "|---|---:|---:|---|---:|"]
    for task in tasks:
        for name, metric in task["metrics"].items():
            error = f" ± {metric['error']:.4f}" if metric["error"] is not None else ""
            shots = "" if task.get("shots") is None else task["shots"]
            value = _number(metric["value"], ".4f") + error
            lines.append(f"| {task['task']} | {shots} | {task['documents']} | {name} | {value} |")
    return "\n".join(lines)


def _task_results(task: Mapping[str, Any]) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name="Evaluation harness",
            dataset_type=task["task"],
            dataset_name=task["task"],
            metric_type=name,
            metric_name=f"{name}, {task['documents']} documents",
            metric_value=metric["value"],
        )
        for name, metric in task["metrics"].items()
        if metric["value"] is not None
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _result(figure: Mapping[str, Any]) -> "EvalResult":
    from huggingface_hub import EvalResult

    dataset, config, split = figure["dataset"]
    return EvalResult(
        task_type="text-generation",
        task_name="Language modelling",
        dataset_type=dataset,
        dataset_name=figure["name"],
        dataset_config=config,
        dataset_split=split,
        metric_type="perplexity",
        metric_name=f"perplexity, {figure['windows']} windows of {figure['length']} tokens",
        metric_value=figure["perplexity"],
    )
