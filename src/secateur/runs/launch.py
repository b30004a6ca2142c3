"""Processes of one machine that share a run, started by the first command: one for each device that was named."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

PATIENCE = 20.0  # seconds that the others have to end by themselves when one has failed


def launch(devices: Sequence[str], arguments: Sequence[str]) -> int:
    """The exit code of `python -m secateur` with these arguments, in one process for each device.

    Each finds its own device by its number, as under torchrun. Where one fails, the others hear of it and end; what
    does not is ended.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    count = len(devices)
    # Exact: the store lives here, so that what a process says before it ends can still be read.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": threads,
    }
    running = [
        subprocess.Popen(  # nosec B603 # this program again
            [sys.executable, "-m", "secateur", *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]

    def pass_on(number: int, frame: object) -> None:
        """A signal that came to this process alone; one from a terminal has reached all of them."""
        for process in running:
            with suppress(OSError):
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return _wait(running)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: Sequence["subprocess.Popen[bytes]"]) -> int:
    """The exit code of the first process, or of one that failed where the first did not."""
    until: float | None = None
    while any(process.poll() is None for process in running):
        if until is None and any(process.returncode for process in running):
            until = time.monotonic() + PATIENCE
        if until is not None and time.monotonic() > until:
            for process in running:
                with suppress(OSError):
                    process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in running]
    code = codes[0] or next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code
