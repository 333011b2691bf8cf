"""Settings of pseudo-labeling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stseg.functional.thresholds import check_threshold, leaves_out
from stseg.inference.labeler import check_stored
from stseg.models.multi_scale import MultiScaleFlip


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """Settings of pseudo-labeling; the defaults are those of the paper (Yang et al., CVPR 2022).

    Args:
        tta: wraps the network for labeling; None labels at one scale, about 15 times faster.
        threshold: pixels whose confidence is below it are ignored in pseudo-masks; one value, or one for each class.
            The paper keeps all (0).
        keep_per_class: share, in (0, 1], of the pixels of each predicted class to keep, in place of ``threshold``. The
            thresholds are computed for each labeling, which takes a second pass over its images.

    Raises:
        ValueError: if a setting is out of its range, or both thresholds are given.
        TypeError: if ``tta`` is not callable.

    Example:
        >>> Labeling(tta=None, keep_per_class=0.8).keep_per_class
        0.8
    """

    tta: Callable[[nn.Module], nn.Module] | None = MultiScaleFlip
    threshold: float | Sequence[float] | Tensor = 0.0
    keep_per_class: float | None = None

    def __post_init__(self) -> None:
        classes = 1 if isinstance(self.threshold, (int, float)) else len(self.threshold)
        object.__setattr__(self, "threshold", check_threshold(self.threshold, classes))
        if self.tta is not None and not callable(self.tta):
            raise TypeError(f"tta is {self.tta!r}; expected a function that wraps a network, or None")
        keep = self.keep_per_class
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"keep_per_class is {keep}; expected a share in (0, 1], or None")
        if keep is not None and self.leaves_pixels_out(by_threshold=True):
            raise ValueError(f"threshold is {self.threshold} and keep_per_class {keep}; expected one of the two")

    def leaves_pixels_out(self, *, by_threshold: bool = False) -> bool:
        """Return whether pixels may get the ignore index."""
        assert isinstance(self.threshold, (float, tuple))
        return leaves_out(self.threshold) or (self.keep_per_class is not None and not by_threshold)

    def check(self, num_classes: int, ignore_index: int, *, on_disk: bool) -> None:
        """Raise a ``ValueError`` if the settings do not fit the classes, or masks on disk."""
        check_threshold(self.threshold, num_classes)
        if on_disk and self.leaves_pixels_out():
            check_stored(ignore_index)
