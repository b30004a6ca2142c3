"""Work on one tensor after the other, of which some are worked on ahead in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 8  # each holds a tensor or two, and a disk is not faster with more of them


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What a function makes of the items, in their order, on as many threads as torch takes, 8 at most.

    Memory: no more results wait than there are threads. What the function raises is raised in the place of its result,
    and no further item is begun.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    pool = ThreadPoolExecutor(threads, "ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
