"""Files as this version writes them, kept for later ones: `python tests/kept_files.py FOLDER`.

They lie in `tests/record/kept`, in a folder for each version that changed a format; those of earlier versions stay.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.runs.events import Event

IDS = torch.arange(32).view(4, 8)


class EndError(Exception):
    """Ends a run in its middle."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = folder / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    secateur.prune(model, output=folder / "pruned", method="sparsegpt", calibration=IDS)
    secateur.gradients(model, folder / "gradients.safetensors", norms=["l1", "l2"], calibration=IDS)

    def end(event: Event) -> None:
        if event.stage == "read" and event.block == 1:
            raise EndError

    def end_gradients(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("backward", 1):
            raise EndError

    for run in (
        lambda: secateur.prune(model, output=folder / "unfinished", method="gblm", calibration=IDS, on_event=end),
        lambda: secateur.gradients(model, folder / "half", calibration=IDS, progress=end_gradients),
    ):
        try:
            run()
        except EndError:
            continue
        raise SystemExit("the run was not ended")
    for lock in folder.rglob("lock"):
        assert lock.stat().st_size == 0  # git keeps it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
