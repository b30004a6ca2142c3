"""Whether a packed model computes what the plain checkpoint does: each matrix against float64, and greedy text.

    python benchmarks/packed_numbers.py PRUNED PACKED [--prompts 20] [--tokens 64]

Matrices: the relative error (Frobenius) of the product with random inputs in bfloat16, by the kernel and by F.linear,
both against float64. Text: each prompt is continued greedily by transformers with the plain checkpoint, and by the
packed one, both computing in the dtype of the checkpoint, or in `--dtype`. Where they first differ, the plain
checkpoint is run on the common beginning again, in that dtype and in float32. The first difference is a tie within
rounding if the logits of the two tokens, in float32, are no further apart than four standard deviations of what the
dtype's rounding does to the difference of two logits of the plain checkpoint there (over its 100 likeliest tokens);
four, because the most extreme of some thousand tokens is looked for. The exit status is 1 if one is not, or if the
kernel is less exact than torch.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.runtime.linear import PackedLinear

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three branches of the government of the United States are",
    "In 1969, the first human",
    "To make a good cup of tea, you should",
    "The quick brown fox",
    "A prime number is",
    "Photosynthesis is the process by which",
    "My favourite book is",
    "The largest planet in the solar system",
    "If a train leaves the station at noon and travels at 60 miles per hour,",
    "Dear Sir or Madam,",
    "The difference between a virus and a bacterium is",
    "import numpy as np",
    "Shakespeare wrote",
    "The best way to learn a new language is",
    "On the first day of school,",
    "Neural networks are",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    packed = secateur.load(options.packed, device="cpu", backend="packed", dtype=options.dtype)
    exact = compare_products(packed)
    plain = AutoModelForCausalLM.from_pretrained(options.pruned, dtype=packed.dtype).eval()
    wide = AutoModelForCausalLM.from_pretrained(options.pruned, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.pruned)
    same = ties = 0
    for number, prompt in enumerate(PROMPTS[: options.prompts]):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        texts = [
            model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)[0]
            for model in (plain, packed)
        ]
        length = min(map(len, texts))
        different = (texts[0][:length] != texts[1][:length]).nonzero()
        if not len(different):
            same += 1
            continue
        at = int(different[0])
        tie, said = explain(plain, wide, texts[0][:at], [int(text[at]) for text in texts])
        ties += tie
        print(f"prompt {number} differs at token {at - inputs['input_ids'].shape[1]}: {said}", flush=True)
    other = options.prompts - same - ties
    print(
        f"{options.prompts} prompts, {options.tokens} tokens: {same} the same, {ties} differ first at a tie within "
        f"rounding, {other} otherwise"
    )
    return int(other > 0 or not exact)


def compare_products(packed: torch.nn.Module) -> bool:
    """Print the errors of all matrices; whether the kernel's are at most torch's."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 16):
        errors: list[tuple[float, float]] = []
        for layer in packed.modules():
            if not isinstance(layer, PackedLinear):
                continue
            dense = layer.packed.expand()
            x = torch.randn(rows, layer.in_features, generator=generator).to(dense.dtype)
            reference = x.double() @ dense.double().T
            products = layer(x), functional.linear(x, dense)
            own, torchs = (float((y.double() - reference).norm() / reference.norm()) for y in products)
            errors.append((own, torchs))
        means = [sum(column) / len(errors) for column in zip(*errors, strict=True)]
        worse = sum(own > torchs * 1.001 for own, torchs in errors)
        print(
            f"{len(errors)} matrices, {rows} rows of input: relative error {means[0]:.3e} by the kernel, "
            f"{means[1]:.3e} by F.linear; the kernel is less exact for {worse}",
            flush=True,
        )
        if means[0] > means[1] * 1.001:
            return False
    return True


def explain(
    plain: torch.nn.Module, wide: torch.nn.Module, beginning: torch.Tensor, tokens: list[int]
) -> tuple[bool, str]:
    """Whether two tokens tie after a text, and the figures."""
    own, exact = (model(input_ids=beginning[None]).logits[0, -1].float() for model in (plain, wide))
    likeliest = exact.topk(100).indices
    # Of two logits, each of which is moved by so much.
    moves = 4 * 2**0.5 * float((own - exact)[likeliest].std())
    gap = abs(float(exact[tokens[0]] - exact[tokens[1]]))
    return gap <= moves, (
        f"logits of the two tokens {own[tokens].tolist()} in {str(plain.dtype).removeprefix('torch.')}, apart by "
        f"{gap:.4f} in float32; rounding moves such differences by up to {moves:.4f}"
        f"{'' if gap <= moves else ', which does not explain it'}"
    )


if __name__ == "__main__":
    sys.exit(main())
