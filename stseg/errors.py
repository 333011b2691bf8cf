"""Errors that callers may want to catch. Each names the item, what it is and what was expected."""

from __future__ import annotations


class StsegError(Exception):
    """Base class of the errors of stseg."""


class DataError(StsegError, ValueError):
    """An image, a mask, an id or a data set is invalid."""


class UnreadableImageError(DataError, OSError):
    """A file cannot be decoded as an image: truncated, empty, or not an image at all."""


class DamagedFileError(DataError):
    """A file of a work directory or a mask store is damaged, or is not the one that was written there.

    The message names the file and what to delete; the same call then makes it again.
    """


class DataWarning(UserWarning):
    """Data that can be used but are probably not what was meant."""


class NetworkError(StsegError, ValueError):
    """A network did not return the expected logits."""


class NetworkWarning(UserWarning):
    """A network that can be trained, but probably not as it was meant."""


class MethodError(StsegError, RuntimeError):
    """A training step fails, or a method does not implement the interface of :class:`stseg.Method`."""


class MetricError(StsegError, RuntimeError):
    """An extra metric fails, or computes something else than numbers."""


class TrainingDivergedError(StsegError, RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
        step: the iteration, counted from 1, whose loss was not finite.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class WorkdirMismatchError(StsegError, ValueError):
    """A folder holds the results of other settings, another network or other data."""


class WorkdirInUseError(StsegError, RuntimeError):
    """Another process is using a folder."""


class WorkdirMissingError(StsegError, RuntimeError):
    """A work directory was removed or moved while a run was using it."""
