"""Functions that run in a forked child, for tests of locks and killed writers."""

from __future__ import annotations

import multiprocessing


def start(function, *arguments):
    """Start a function in a child; its last argument is where it sends its answers."""
    fork = multiprocessing.get_context("fork")
    answer, there = fork.Pipe(duplex=False)
    process = fork.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    return process, answer


def in_child(function, *arguments):
    """Return the first answer of a function in a child."""
    process, answer = start(function, *arguments)
    got = answer.recv()
    process.join()
    return got


def kill(process):
    """Kill a child as the system does."""
    process.kill()
    process.join()
