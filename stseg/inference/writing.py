"""Writing of results by threads while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def writing_behind(*, threads: int = 4, most: int = 64) -> Iterator[Callable[..., None]]:
    """Give a function that hands a call to threads, in a bounded queue; on exit, all calls are done.

    Args:
        threads: how many.
        most: calls that may wait, before the next one waits for the first of them.

    Raises:
        Exception: that of a call, at a later call or on exit.

    Example:
        >>> done = []
        >>> with writing_behind() as write:
        ...     write(done.append, 1)
        >>> done
        [1]
    """
    with ThreadPoolExecutor(threads) as executor:
        waiting: deque[Future[Any]] = deque()

        def write(function: Callable[..., object], *args: Any, **options: Any) -> None:
            waiting.append(executor.submit(function, *args, **options))
            while len(waiting) > most:
                waiting.popleft().result()

        yield write
        for job in waiting:
            job.result()
