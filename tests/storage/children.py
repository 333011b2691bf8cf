"""Functions that run in a forked child, for tests of locks and killed writers.

The threads that torch computes with are not there in a forked child, which would wait for them for ever: it computes
alone.
"""

from __future__ import annotations

import multiprocessing

import torch


def start(function, *arguments):
    """Start a function in a child; its last argument is where it sends its answers."""
    fork = multiprocessing.get_context("fork")
    answer, there = fork.Pipe(duplex=False)
    process = fork.Process(target=alone, args=(function, *arguments, there))
    process.start()
    there.close()
    return process, answer


def alone(function, *arguments):
    torch.set_num_threads(1)
    function(*arguments)


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
