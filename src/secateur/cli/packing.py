"""`pack` and `unpack`, and what runs packed checkpoints: `generate` and `bench`."""

import sys
from dataclasses import replace

from secateur.cli.app import Config, Json, command
from secateur.cli.display import print_json, print_result, quiet_libraries, stage_progress
from secateur.cli.streams import visible
from secateur.cli.voice import say
from secateur.runtime.settings import BenchSettings, GenerateSettings, PackSettings, UnpackSettings


@command(
    "secateur pack ./pruned -o ./packed",
    "secateur pack ./pruned -o ./packed --values int8",
    "secateur pack ./packed -o ./small --compress",
    "secateur pack ./pruned --dry-run",
)
def pack(settings: PackSettings, config: Config = None, as_json: Json = False) -> None:
    """Write a pruned checkpoint with its zeros left out: a bit for each weight, and the weights that are kept.

    Every tensor that becomes smaller is packed, the others stay as they are. Nothing is lost, except by int8
    values: `unpack` gives back every byte. Transformers and other runtimes do not load packed checkpoints and say so;
    Secateur's own commands do.
    """
    with stage_progress() as show, quiet_libraries():
        from secateur.report.packed import packing_tables
        from secateur.runtime.pack import pack as write

        result = write(**vars(replace(settings, progress=show)))
    print_result(result, packing_tables, as_json)


@command(
    "secateur unpack ./packed -o ./plain",
    "secateur unpack ./sparse-bitmask -o ./plain",
)
def unpack(settings: UnpackSettings, config: Config = None, as_json: Json = False) -> None:
    """Write the ordinary checkpoint that a packed one stands for, which transformers and other runtimes load.

    It also reads the formats sparse-bitmask and sparse-24-bitmask of compressed-tensors, which no current release does.
    """
    with stage_progress() as show, quiet_libraries():
        from secateur.report.packed import unpacking_tables
        from secateur.runtime.unpack import unpack as write

        result = write(**vars(replace(settings, progress=show)))
    print_result(result, unpacking_tables, as_json)


@command(
    'secateur generate ./packed "The capital of France is"',
    'secateur generate ./packed "Write a haiku about pruning." --chat --temperature 0.7 --seed 1',
    "secateur generate ./packed --max-tokens 32 < prompt.txt",
)
def generate(settings: GenerateSettings, config: Config = None, as_json: Json = False) -> None:
    """Continue a text with a model, plain or packed. Text goes to standard output as it is written."""
    from secateur.errors import SecateurError

    prompt = settings.prompt
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise SecateurError(
                'prompt: got none. Give it in quotes, as in: secateur generate MODEL "Once upon a time"'
            )
        prompt = sys.stdin.read()

    def show(text: str) -> None:
        if not as_json:
            print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)

    with quiet_libraries():
        from secateur.runtime.generate import generate as write

        result = write(**vars(replace(settings, prompt=prompt, on_text=show)))
    if as_json:
        print_json(result.to_json())
        return
    print()
    rate = result.tokens_per_second
    say(
        f"loaded in {result.load_seconds:.1f} s; {result.prompt_tokens} tokens read in {result.first_seconds:.2f} s, "
        f"{len(result.tokens)} written" + ("" if rate is None else f" at {rate:.1f} tokens per second")
    )


@command(
    "secateur bench ./packed",
    "secateur bench ./pruned ./packed --prompt 512 --decode 64 --batch 1,4,16",
    "secateur bench ./packed --threads 1 --json",
)
def bench(settings: BenchSettings, config: Config = None, as_json: Json = False) -> None:
    """Measure sizes, and the speed of reading a prompt and of writing tokens, on this machine's CPU.

    A packed checkpoint is measured packed and expanded, in turns. A gain is only shown where every repetition of the
    packed model was faster than each of the fastest dense one.
    """
    with stage_progress() as show, quiet_libraries():
        from secateur.report.packed import bench_tables
        from secateur.runtime.bench import bench as measure

        result = measure(**vars(replace(settings, progress=show)))
    print_result(result, bench_tables, as_json)
