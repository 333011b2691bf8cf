"""ClassMix: the pixels of half of the classes of another image of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stseg.checks import check_probability
from stseg.functional.mixing import paste


@dataclass(frozen=True)
class ClassMix:
    """ClassMix (Olsson et al., WACV 2021, section 3.1): paste the pixels of half of an image's classes into another.

    Of the n classes that are present in the labels of image i, ``floor(share * n)`` are drawn without replacement, and
    their pixels replace those of image i + 1 (the last one is pasted into the first). With one class, nothing is
    pasted. Ignored pixels are never pasted.

    Args:
        share: share of the classes of an image that is pasted, in [0, 1].

    Shape:
        labels ``(B, H, W)`` integers and any number of tensors ``(B, C, H, W)`` or ``(B, H, W)`` -> as many tensors of
        the same shapes and dtypes: row i holds the chosen classes of image i on image i + 1. Labels are mixed only if
        they are among the tensors.

    Raises:
        ValueError: if ``share`` is out of its range; when called, if the shapes do not match.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1]], [[2, 2, 3, 3]]])
        >>> (mixed,) = ClassMix()(labels, labels)
        >>> mixed.shape, bool(((mixed == labels) | (mixed == labels.roll(-1, 0))).all())
        (torch.Size([2, 1, 4]), True)
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_probability("share", self.share)

    def __call__(
        self, labels: Tensor, *tensors: Tensor, ignore_index: int = 255, generator: Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Draw classes by the labels and mix all tensors in the same way."""
        return self.transform(self.draw(labels, ignore_index=ignore_index, generator=generator), *tensors)

    def draw(self, labels: Tensor, *, ignore_index: int = 255, generator: Generator | None = None) -> Tensor:
        """Draw masks ``(B, H, W)`` bool for labels ``(B, H, W)``: the pixels of the chosen classes."""
        if labels.ndim != 3 or labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected integers (B, H, W)")
        flat = labels.long().flatten(1)
        counts = flat != ignore_index
        classes = int(torch.where(counts, flat, 0).amax()) + 1 if flat.numel() else 1
        indices = torch.where(counts, flat, classes)  # ignored pixels in a column of their own
        present = torch.zeros(len(flat), classes + 1, dtype=torch.bool, device=flat.device)
        present.scatter_(1, indices, torch.ones_like(counts))
        present[:, classes] = False
        draws = torch.rand(present.shape, generator=generator, device=flat.device).masked_fill(~present, -1.0)
        rank = draws.argsort(1, descending=True).argsort(1)
        chosen = present & (rank < (present.sum(1, keepdim=True) * self.share + 1e-6).floor())
        return chosen.gather(1, indices).reshape(labels.shape)

    def transform(self, where: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Paste the pixels of the masks into the next images of the batch; deterministic."""
        return tuple(paste(where, tensor.roll(-1, 0), tensor) for tensor in tensors)
