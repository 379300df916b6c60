"""Read the next items in threads while the current one is computed."""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

READ_AHEAD = 2  # micro-batches per reading thread


def read_ahead[Item, Result](
    items: Iterable[Item], read: Callable[[Item], Result], *, num_workers: int
) -> Generator[Result]:
    """Yield `read(item)` for each item, in order, while threads read the next ones; close it to end them.

    Threads, since libsndfile, the disk and numpy's copies work without Python's lock: they run beside each other and
    beside the computation, need no start-up time, and hand over no memory. With 0 of them each item is read when it is
    asked for. Their number changes nothing in what is read; what a reading raises is raised in its place.
    """
    if not num_workers:
        yield from map(read, items)
        return
    ahead: collections.deque[Future[Result]] = collections.deque()
    threads = ThreadPoolExecutor(num_workers, "reader")
    try:
        for item in items:
            ahead.append(threads.submit(read, item))
            if len(ahead) > READ_AHEAD * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
