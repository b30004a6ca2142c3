"""Products with packed weights against the best dense call of torch, and against the bandwidth of this machine.

    python benchmarks/packed_kernel.py [--quick] [--threads 1,2] [--batch 1,4,16,64,512] [--shape 4096x11008]

Every call takes another matrix than the one before, so that nothing stays in the cache. Dense: F.linear, and torch.mv
for one row, each in bfloat16 and float32; the fastest counts. All calls for a number of rows are timed in turn, round
by round. A gain is claimed only where the third quartile of the packed times is below the first quartile of the dense
ones. The path is chosen as always, by SECATEUR_KERNEL or the processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from secateur.runtime import kernels
from secateur.runtime.layout import PackedWeight, lay_out

Call = Callable[[int], Tensor]


def pruned(dense: Tensor, pattern: str) -> Tensor:
    """The matrix without a random part of its weights: a share such as 0.5, or 2:4."""
    if pattern == "2:4":
        noise = torch.rand(dense.shape[0], dense.shape[1] // 4, 4)
        return torch.where(noise >= noise.sort(dim=2).values[..., 2:3], dense.view_as(noise), 0).view_as(dense)
    return torch.where(torch.rand_like(dense, dtype=torch.float32) >= float(pattern), dense, 0)


def packed(dense: Tensor, dtype: str) -> PackedWeight:
    kept = dense != 0
    bitmask = torch.from_numpy(numpy.packbits(kept.numpy(), axis=1, bitorder="little"))
    if dtype == "bf16":
        return lay_out(bitmask, dense[kept].bfloat16(), dense.shape[1])
    scales = dense.abs().amax(dim=1) / 127
    values = (dense / scales[:, None]).round().to(torch.int8)[kept]
    return lay_out(bitmask, values, dense.shape[1], scales=scales)


def in_turn(calls: dict[str, Call], matrices: int, seconds: float) -> dict[str, list[float]]:
    """The times of each call, at least four of each, for about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    started, turn = time.perf_counter(), 0
    while turn < 4 or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            if sum(times[name]) > 3 * seconds and turn >= 2:  # far slower than the rest
                continue
            before = time.perf_counter()
            call(turn % matrices)
            times[name].append(time.perf_counter() - before)
        turn += 1
    return times


def read_bandwidth(arrays: list[Tensor]) -> float:
    """Bytes per second that the threads of torch read: the best of sums over arrays that no cache holds."""
    best = 0.0
    for array in arrays * 4:
        words = array.view(torch.int32)
        before = time.perf_counter()
        torch.max(words)
        best = max(best, words.nbytes / (time.perf_counter() - before))
    return best


def quartiles(times: list[float]) -> tuple[float, float, float]:
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, median, third


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.5 only, batch 1 and 16, in under a minute")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", default="1,4,16,64,512")
    parser.add_argument("--shape", default="4096x11008")
    parser.add_argument("--patterns", default="0.5,0.6,2:4")
    parser.add_argument("--values", default="bf16,int8")
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row of the table")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.patterns, options.seconds = "1,16", "0.5", 1.5
    rows, columns = map(int, options.shape.split("x"))
    torch.manual_seed(0)
    dense = [torch.randn(rows, columns) for _ in range(options.matrices)]
    halves = [matrix.bfloat16() for matrix in dense]
    weights = {
        (pattern, dtype): [packed(pruned(matrix.float(), pattern), dtype) for matrix in halves]
        for pattern in options.patterns.split(",")
        for dtype in options.values.split(",")
    }
    print(
        f"{rows} x {columns}, {options.matrices} matrices in turn, path {kernels.chosen()}, torch {torch.__version__}"
    )
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth(dense)
        print(f"\n{threads} thread(s): read bandwidth {bandwidth / 1e9:.1f} GB/s")
        print("batch  pattern values      ms (quartiles)       best dense        ms   gain   GB/s  share")
        for batch in map(int, options.batch.split(",")):
            x = torch.randn(batch, columns)
            half = x.bfloat16()
            calls: dict[str, Call] = {
                "F.linear bf16": lambda i, x=half: functional.linear(x, halves[i]),
                "F.linear float32": lambda i, x=x: functional.linear(x, dense[i]),
            }
            if batch == 1:
                calls["mv bf16"] = lambda i, x=half: torch.mv(halves[i], x[0])
                calls["mv float32"] = lambda i, x=x: torch.mv(dense[i], x[0])
            names = {}
            for (pattern, dtype), matrices in weights.items():
                names[name := f"{pattern} {dtype}"] = (pattern, dtype, matrices[0].nbytes)
                calls[name] = lambda i, x=half, matrices=matrices: kernels.linear(x, matrices[i])
            with torch.inference_mode():
                times = in_turn(calls, options.matrices, options.seconds * len(names))
            best = min((name for name in calls if name not in names), key=lambda name: statistics.median(times[name]))
            dense_first, dense_median, _ = quartiles(times[best])
            for name, (pattern, dtype, size) in names.items():
                first, median, third = quartiles(times[name])
                gain = f"{dense_median / median:5.2f}x" if third < dense_first else "  none"
                rate = size / median
                ours = f"{median * 1e3:7.2f} ({first * 1e3:.2f}-{third * 1e3:.2f})"
                theirs = f"{best:>18} {dense_median * 1e3:8.2f} {gain} {rate / 1e9:6.1f} {rate / bandwidth:6.2f}"
                print(f"{batch:5}  {pattern:>7} {dtype:>6}  {ours:<23}{theirs}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
