"""`pack` and `unpack`."""

from dataclasses import replace

from secateur.cli.app import Config, Json, command
from secateur.cli.display import print_result, quiet_libraries, stage_progress
from secateur.runtime.settings import PackSettings, UnpackSettings


@command(
    "secateur pack ./pruned -o ./packed",
    "secateur pack ./pruned -o ./packed --values int8",
    "secateur pack ./pruned --dry-run",
)
def pack(settings: PackSettings, config: Config = None, as_json: Json = False) -> None:
    """Write a pruned checkpoint with its zeros left out: a bit for each weight, and the weights that are kept.

    Every tensor that becomes smaller is packed, the others stay as they are. Nothing is lost, except with --values
    int8: `unpack` gives back every byte. Transformers and other runtimes do not load packed checkpoints and say so;
    Secateur's own commands do.
    """
    with quiet_libraries(), stage_progress() as show:
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
    with quiet_libraries(), stage_progress() as show:
        from secateur.report.packed import unpacking_tables
        from secateur.runtime.unpack import unpack as write

        result = write(**vars(replace(settings, progress=show)))
    print_result(result, unpacking_tables, as_json)
