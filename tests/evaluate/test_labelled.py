"""What models answer beside labels: streamed figures against transformers' own pipelines and plain forwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

import secateur
import tiny
from command_line import Call, call, save_model  # noqa: F401
from secateur.cli.evaluation import evaluation_store
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError
from secateur.report.evaluations import read_evaluations, tables
from speech_files import record

NAMES = ["Pear", "red apple", "tench, Tinca tinca", "crane", "crane, bird", "plum", "fig", "quince"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier of images with eight classes, and the same pruned."""
    folder = tmp_path_factory.mktemp("classifiers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        config = ViTConfig(image_size=24, patch_size=8, **sizes, initializer_range=0.5, id2label=dict(enumerate(NAMES)))
        ViTForImageClassification(config).save_pretrained(folder / "dense")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder / "dense")
    secateur.prune(folder / "dense", method="magnitude", output=folder / "pruned")
    return folder / "dense", folder / "pruned"


def paint(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (30, 36, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(file)


def said(model: Path, files: list[Path]) -> list[list[str]]:
    """The five first choices for each file, as transformers' own pipeline has them."""
    classify = pipeline("image-classification", model=str(model), device="cpu")
    return [[own["label"] for own in classify(str(file), top_k=5)] for file in files]


def test_images_in_folders_by_class(classifiers: tuple[Path, Path], tmp_path: Path) -> None:
    """Folders are named by classes in any case, by one of several names, or by numbers; pictures come by turns."""
    folders = {"pear": 0, "red_apple": 1, "tench": 2, "3": 3, "crane, bird": 4, "7": 7}
    for number, name in enumerate(folders):
        for copy in range(1 + number % 3):
            paint(tmp_path / "in" / name / f"{copy}.png", 10 * number + copy)
    (found,) = secateur.labelled(classifiers[0], [classifiers[1]], f"images:{tmp_path / 'in'}", batch_size=4)
    files = sorted((tmp_path / "in").rglob("*.png"), key=lambda file: (file.name, file.parent.name))
    labels = [NAMES[folders[file.parent.name]] for file in files]
    assert found.labels == [NAMES.index(label) for label in labels]
    choices = [said(model, files) for model in classifiers]
    assert [found.answers_dense, found.answers] == [[NAMES.index(own[0]) for own in model] for model in choices]
    same = numpy.array([one[0] == other[0] for one, other in zip(*choices, strict=True)], float)
    assert found.agreement == pytest.approx(same.mean())
    assert found.agreement_error == pytest.approx(same.std(ddof=1) / len(files) ** 0.5)
    assert 0 < found.agreement < 1
    for name, count in {"top1": 1, "top5": 5}.items():
        right = [
            numpy.array([label in own[:count] for label, own in zip(labels, model, strict=True)], float)
            for model in choices
        ]
        figure, difference = found.figures[name], right[1] - right[0]
        assert (figure.dense, figure.pruned) == pytest.approx((right[0].mean(), right[1].mean()))
        assert figure.difference == pytest.approx(difference.mean())
        assert figure.difference_error == pytest.approx(difference.std(ddof=1) / len(files) ** 0.5)
        assert figure.dense_error == pytest.approx(right[0].std(ddof=1) / len(files) ** 0.5)
        assert (figure.right_to_wrong, figure.wrong_to_right) == ((difference == -1).sum(), (difference == 1).sum())
    with torch.no_grad():
        p, q = (
            ViTForImageClassification.from_pretrained(model)(
                ViTImageProcessorPil.from_pretrained(classifiers[0])(
                    [Image.open(file) for file in files], return_tensors="pt"
                ).pixel_values
            )
            .logits.double()
            .log_softmax(-1)
            for model in classifiers
        )
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert "top-1 %" in repr(found)
    assert "top-5 %" in found._repr_html_()


@pytest.mark.parametrize("table", ["labels.csv", "metadata.csv", "metadata.jsonl"])
def test_images_in_a_table(classifiers: tuple[Path, Path], tmp_path: Path, table: str) -> None:
    rows = [("a.png", "Pear"), ("inner/b.png", "crane, bird"), ("c.png", "1")]
    if table == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    else:
        lines = ["file_name,note,label", *(f'{name},"none, really","{label}"' for name, label in rows)]
    rows = [row for row in rows if row[0] != "inner/b.png"]
    (tmp_path / table).write_text("\n".join(lines) + "\n")
    for number, (name, _) in enumerate(rows):
        paint(tmp_path / name, number)
    (found,) = secateur.labelled(classifiers[0], [classifiers[0]], f"images:{tmp_path}")
    assert found.labels == [0, 1]
    assert (found.agreement, found.kl) == (1, 0)


def test_without_labels_there_is_agreement_alone(classifiers: tuple[Path, Path], tmp_path: Path) -> None:
    pixels = tiny.pixels(6)
    (found,) = secateur.labelled(classifiers[0], [classifiers[1]], pixels)
    with torch.no_grad():
        first = [ViTForImageClassification.from_pretrained(model)(pixels).logits.argmax(-1) for model in classifiers]
    assert found.agreement == pytest.approx(float((first[0] == first[1]).double().mean()))
    assert (found.labels, found.figures) == (None, {})


def test_inputs_by_name_with_labels(classifiers: tuple[Path, Path]) -> None:
    given = {"pixel_values": tiny.pixels(4), "labels": torch.tensor([3, 0, 7, 1])}
    (found,) = secateur.labelled(classifiers[0], [classifiers[1]], given)
    with torch.no_grad():
        first = ViTForImageClassification.from_pretrained(classifiers[0])(given["pixel_values"]).logits.argmax(-1)
    assert found.labels == [3, 0, 7, 1]
    assert found.figures["top1"].dense == float((first == given["labels"]).double().mean())


def test_recordings_in_folders_by_class(tmp_path: Path) -> None:
    layers: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [40, 8], "conv_kernel": [80, 16]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Wav2Vec2Config(**sizes, **layers, num_conv_pos_embedding_groups=4, num_labels=3)
        model = Wav2Vec2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    extractor, sounds = Wav2Vec2FeatureExtractor(), []
    extractor.save_pretrained(tmp_path / "dense")
    for number in range(5):
        (tmp_path / "in" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        sounds.append(record(tmp_path / "in" / str(number % 3) / f"{number}.wav", 6000, number))
    (found,) = secateur.labelled(tmp_path / "dense", [tmp_path / "dense"], f"audio:{tmp_path / 'in'}")
    with torch.no_grad():
        first = [
            int(model(extractor(own, sampling_rate=16000, return_tensors="pt").input_values).logits.argmax())
            for own in sounds
        ]
    assert found.labels == [0, 1, 2, 0, 1]
    assert found.answers == first
    assert found.figures["accuracy"].dense == pytest.approx(
        numpy.mean([own == label for own, label in zip(first, found.labels, strict=True)])
    )
    config.use_weighted_layer_sum = True
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / "weighted")
    extractor.save_pretrained(tmp_path / "weighted")
    with pytest.raises(ModelStructureError, match="chooses between no classes"):
        secateur.labelled(tmp_path / "weighted", [tmp_path / "dense"], f"audio:{tmp_path / 'in'}")


def test_synsets_are_classes_in_their_order_where_all_are_there(classifiers: tuple[Path, Path], tmp_path: Path) -> None:
    for number in range(len(NAMES)):
        paint(tmp_path / f"n0144076{number}" / "a.jpg", number)
    (found,) = secateur.labelled(classifiers[0], [classifiers[0]], f"images:{tmp_path}")
    assert found.labels == list(range(len(NAMES)))
    shutil.rmtree(tmp_path / "n01440760")
    with pytest.raises(CalibrationError, match=r'has the label "n01440761", and ViTForImageClassification knows 8'):
        secateur.labelled(classifiers[0], [classifiers[0]], f"images:{tmp_path}")


def test_what_cannot_be_is_said(classifiers: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = CalibrationError, *, dense: Path = classifiers[0]) -> None:
        with pytest.raises(kind, match=match):
            secateur.labelled(dense, [classifiers[1]], f"images:{tmp_path / 'in'}")

    paint(tmp_path / "in" / "quinces" / "a.png", 0)
    refused(r'quinces/a\.png: has the label "quinces".* and 3 more\. Did you mean "quince"\? .* from 0 to 7\.')
    (tmp_path / "in" / "quinces").rename(tmp_path / "in" / "8")
    refused(r'8/a\.png: has the label "8"')
    paint(tmp_path / "in" / "b.png", 0)
    (tmp_path / "in" / "labels.csv").write_text("file_name,label\nb.png,grape\n")
    refused(r'labels\.csv, line 2, b\.png: has the label "grape"')
    paint(tmp_path / "in" / "c.png", 0)
    refused(r"has labels of 1 files, and none of c\.png \(1 of 2 are missing\)")
    (tmp_path / "in" / "labels.csv").write_text("file,label\nb.png,grape\n")
    refused(r"labels\.csv, line 2: has no file_name; columns found: file, label")
    (tmp_path / "in" / "labels.csv").write_text("file_name,label\nb.png,grape,9\n")
    refused(r"labels\.csv, line 2: has another number of values")
    vit = tiny.save("vit", tmp_path / "vit")
    refused("ViTModel: chooses between no classes", ModelStructureError, dense=vit)
    config = ViTConfig.from_pretrained(classifiers[0], num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(CheckpointError, match="chooses between 3 classes, the dense model between 8"):
        secateur.labelled(classifiers[0], [tmp_path / "three"], tiny.pixels(2))


def test_compare_of_classifiers(call: Call, classifiers: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    for number, name in enumerate(["Pear", "fig", "plum"]):
        paint(tmp_path / "in" / name / "a.png", number)
    models: list[Any] = [*map(str, classifiers), "--data", f"images:{tmp_path / 'in'}"]
    shown = call("compare", *models, "--csv", str(tmp_path / "table.csv"))
    assert shown.code == 0, shown.err
    assert "3 samples: choices of 8 classes" in shown.out
    assert "top-1 %" in shown.out
    (tmp_path / "compare.json").write_text(call("compare", *models, "--json").out)
    printed = json.loads((tmp_path / "compare.json").read_text())
    (row,) = printed["labelled"]
    # As kept, and as read from that file, the report has them.
    (kept,) = (record for record in evaluation_store().of(secateur.model_digest(classifiers[1])))
    assert (kept.kind, kept.result["figures"]) == ("labelled", row["figures"])
    (table,) = tables(read_evaluations(tmp_path / "compare.json", classifiers[1]))
    assert [cells[2].text for cells in table.rows] == ["top-1 %", "top-5 %"]
    assert table.rows[0][4].value == pytest.approx(100 * row["figures"]["top1"]["pruned"])
    assert printed["format"] == 1
    assert row["figures"]["top1"].keys() >= {"dense", "pruned", "difference", "difference_error"}
    assert row["samples"] == 3
    head, *lines = (tmp_path / "table.csv").read_text().splitlines()
    own = dict(zip(head.split(","), lines[1].split(","), strict=True))
    assert (own["kind"], float(own["top1"])) == ("labelled", row["figures"]["top1"]["pruned"])


WORDS = ["a", "bed", "sat", "at", "the", "desk", "and", "never", "again"]
MOODS = {0: "good", 1: "bad", 2: "so so"}


def reader(limit: int = 24) -> PreTrainedTokenizerFast:
    """A tokenizer of nine words that marks the two texts of a pair."""
    known = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_input_names=names, model_max_length=limit
    )


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier of texts with three classes, and the same pruned."""
    folder = tmp_path_factory.mktemp("readers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=16, max_position_embeddings=24, **sizes, initializer_range=0.6, id2label=dict(MOODS)
        )
        BertForSequenceClassification(config).save_pretrained(folder / "dense")
    reader().save_pretrained(folder / "dense")
    secateur.prune(folder / "dense", method="magnitude", sparsity=0.6, output=folder / "pruned")
    return folder / "dense", folder / "pruned"


def sentences(count: int, seed: int) -> list[str]:
    random = numpy.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(count)]


@pytest.mark.parametrize(("ending", "pairs"), [("jsonl", False), ("csv", True)])
def test_texts_and_pairs(readers: tuple[Path, Path], tmp_path: Path, ending: str, pairs: bool) -> None:
    """Each text by itself through transformers' own pipeline; labels are names in one file, numbers in the other."""
    one, other, moods = sentences(17, 0), sentences(17, 1), [number % 3 for number in range(17)]
    file, columns = tmp_path / f"texts.{ending}", ("premise", "hypothesis") if pairs else ("text",)
    rows = [
        {**dict(zip(columns, texts, strict=False)), "label": mood if pairs else MOODS[mood]}
        for *texts, mood in zip(one, other, moods, strict=True)
    ]
    if ending == "csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    (found,) = secateur.labelled(readers[0], [readers[1]], f"labelled:{file}", batch_size=3)
    numbers = {name: number for number, name in MOODS.items()}
    given = [{"text": text, "text_pair": second} if pairs else text for text, second in zip(one, other, strict=True)]
    choices = []
    for model in readers:
        classify = pipeline("text-classification", model=str(model), device="cpu")
        choices.append(numpy.array([numbers[classify([text])[0]["label"]] for text in given]))
    right = [(own == numpy.array(moods)).astype(float) for own in choices]
    assert 0 < found.agreement < 1
    assert found.agreement == pytest.approx((choices[0] == choices[1]).mean())
    figure = found.figures["accuracy"]
    assert (figure.dense, figure.pruned) == pytest.approx((right[0].mean(), right[1].mean()))
    difference = right[1] - right[0]
    assert figure.difference_error == pytest.approx(difference.std(ddof=1) / 17**0.5)
    assert sorted(found.answers) == sorted(choices[1].tolist())
    assert "17 samples: accuracy %" in repr(found)


def test_columns_by_name_and_texts_that_are_cut(
    readers: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "texts.jsonl"
    rows = [{"said": text, "mood": "Bad", "idx": 1} for text in [*sentences(3, 0), " ".join(WORDS * 4)]]
    file.write_text("\n".join(map(json.dumps, rows)))
    (found,) = secateur.labelled(readers[0], [readers[0]], f"labelled:{file}:said:mood")
    assert found.labels == [1] * 4
    assert "1 of the 4 texts" in caplog.text
    assert "longer than 24 tokens" in caplog.text
    (found,) = secateur.labelled(readers[0], [readers[0]], f"labelled:{file}:said", windows=2)
    assert (found.samples, found.labels, found.figures) == (2, None, {})
    (row,) = secateur.similarity(readers[0], [readers[1]], f"labelled:{file}:said:mood")
    assert "4 texts: cosine" in repr(row)
    for spec, match in {
        "": r"which columns are texts\? Columns found: said, mood, idx\. Name one or two: labelled:FILE",
        ":say": r'texts\.jsonl, entry 1: has no text under "say"',
        ":said:label": r'texts\.jsonl, entry 1: has no text under "label"',
        ":said:idx:more": r"is no file of labelled texts",
    }.items():
        with pytest.raises(CalibrationError, match=match):
            secateur.labelled(readers[0], [readers[0]], f"labelled:{file}{spec}")


def test_decoders_with_a_head_for_classes(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=24, num_labels=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    reader().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "texts.csv").write_text("text,label\na bed,0\na desk,1\nthe bed,2\n")
    (found,) = secateur.labelled(tmp_path / "gpt2", [tmp_path / "gpt2"], f"labelled:{tmp_path / 'texts.csv'}")
    assert (found.labels, found.agreement) == ([0, 1, 2], 1)
    model = tiny.save("llama", tmp_path / "llama")
    with pytest.raises(CalibrationError, match="LlamaForCausalLM predicts the next token"):
        secateur.agreement(model, [model], f"labelled:{tmp_path / 'texts.csv'}")


def test_pairs_calibrate(readers: tuple[Path, Path], tmp_path: Path) -> None:
    """Wanda on pairs of texts: norms over the tokens of each pair as its tokenizer has it, without padding."""
    one, other, file = sentences(9, 4), sentences(9, 5), tmp_path / "pairs.csv"
    file.write_text(
        "\n".join(["premise,hypothesis,label", *(f"{a},{b},calm" for a, b in zip(one, other, strict=True))])
    )
    options: dict[str, Any] = {"method": "wanda", "calibration": f"labelled:{file}", "samples": 6, "seed": 3}
    assert secateur.estimate(readers[0], **options).tokens > 0
    secateur.prune(readers[0], output=tmp_path / "out", **options)
    model, tokenizer = BertForSequenceClassification.from_pretrained(readers[0]).eval(), reader()
    query = model.bert.encoder.layer[0].attention.self.query
    squares = torch.zeros(32)

    def add(module: Any, inputs: Any, output: Any) -> None:
        squares.add_(inputs[0][0].square().sum(0))

    query.register_forward_hook(add)
    chosen = Random(3).sample(range(9), 6)
    assert len({len(tokenizer(one[number], other[number])["input_ids"]) for number in chosen}) > 1
    with torch.no_grad():
        for number in chosen:
            model(**tokenizer(one[number], other[number], return_tensors="pt"))
    lowest = (query.weight.abs() * squares.sqrt()).argsort(dim=1, stable=True)[:, :16]
    expected = query.weight.detach().scatter(1, lowest, 0.0)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], expected)
    llama = save_model(tmp_path / "llama")
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM predicts the next token\. Give it a text"):
        secateur.prune(llama, output=tmp_path / "no", **options)
