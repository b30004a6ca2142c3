"""Groups of processes that share a run, as forks of this one: what torchrun does, without starting interpreters."""

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore

from command_line import ended


def group(count: int, action: Callable[[int], Any], *, forks: bool = False, patience: float = 120) -> list[Any]:
    """What `action(rank)` returns or raises in each of `count` processes, or minus the signal that ended it.

    One process is this one, unless it is to be a fork as well.
    """
    if count == 1 and not forks:
        return [action(0)]
    told, tell = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            children.append(os.fork())
            if not children[-1]:
                # What hangs says where.
                faulthandler.dump_traceback_later(0.8 * patience, file=sys.__stderr__)
                _end(count, rank, int.from_bytes(os.read(told, 4)), action, Path(folder) / str(rank))
        # A lock that a thread of the store holds at a fork would never be given back there: the store comes last.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        os.write(tell, store.port.to_bytes(4) * count)
        codes = [ended(child, patience) for child in children]
        os.close(told)
        os.close(tell)
        return [
            pickle.loads((Path(folder) / str(rank)).read_bytes()) if code == 0 else code
            for rank, code in enumerate(codes)
        ]


def _end(count: int, rank: int, port: int, action: Callable[[int], Any], file: Path) -> NoReturn:
    """Be process `rank` until the action is over."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        try:
            result: Any = action(rank)
        except Exception as error:
            result = error
        file.write_bytes(pickle.dumps(result))
        code = 0
    finally:
        os._exit(code)


def die_at(condition: Callable[..., bool]) -> Callable[..., None]:
    """A function that kills this process where the condition holds of its arguments."""

    def run(*arguments: Any) -> None:
        if condition(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)

    return run
