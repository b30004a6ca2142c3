"""What a launcher such as torchrun tells each of the processes that it starts to do one thing together."""

import os
from dataclasses import dataclass

from secateur.errors import ProcessError


@dataclass(frozen=True)
class Launched:
    """A process: number `rank` of `count`, and number `local_rank` of the `local_count` on its machine, where known."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int | None = 1


def devices_named(name: str) -> list[str]:
    """The devices in a name: several, with commas between them, are for a process on each."""
    return [device.strip() for device in name.split(",")]


def launched() -> Launched:
    """The place of this process among those that were started together; the only one where no launcher says otherwise.

    Raises `ProcessError` where the launcher's environment variables are incomplete, or no numbers.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return Launched()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    told = [
        os.environ.get("RANK", "0"),
        count,
        os.environ.get("LOCAL_RANK", "0"),
        os.environ.get("LOCAL_WORLD_SIZE", "1"),
    ]
    if missing or not all(map(str.isdecimal, told)):
        wrong = f"without {' and '.join(missing)}" if missing else f"beside RANK={told[0]}, LOCAL_RANK={told[2]}"
        raise ProcessError(
            f"WORLD_SIZE={count} {wrong} in the environment: a launcher sets all of them, to whole numbers. Start the "
            "processes with torchrun, or unset WORLD_SIZE for a run in one process."
        )
    rank, _, local_rank, local_count = map(int, told)
    return Launched(rank, int(count), local_rank, local_count if "LOCAL_WORLD_SIZE" in os.environ else None)
