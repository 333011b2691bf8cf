"""Types used in signatures throughout the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

ImageLike: TypeAlias = Tensor | Image.Image
"""uint8 or float [0, 1] tensor ``(C, H, W)``, or a PIL image."""

MaskLike: TypeAlias = Tensor | npt.NDArray[np.integer[Any]] | Image.Image
"""Class indices ``(H, W)``: integer tensor, integer array or PIL image."""

PairTransform: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
"""``(image, mask) -> (image, mask)``, one sample at a time."""

BatchAugmentation: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""``(images, masks, where) -> (images, masks)``, a whole batch on the device."""

BatchMixing: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""``(images, masks, ...) -> (images, masks, ...)``, which mixes the rows of any number of tensors alike."""

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(logits, masks) -> loss``, a scalar: a function, or a module such as ``torch.nn.CrossEntropyLoss()``."""

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]
"""``"fp32"``; ``"bf16"`` for bfloat16 autocast with float32 weights; or ``"auto"``, which is ``"bf16"`` where the
device computes bfloat16 natively (GPUs of Nvidia from compute capability 8 on, CPUs with AVX-512 BF16 or AMX), else
``"fp32"``."""


class Metric(Protocol):
    """Metric of the caller, as those of torchmetrics are: it is updated with each image, and then computes a value.

    The maps are int64, ``(1, H, W)``, on the CPU or on the metric's own ``device``, one image at a time, as images
    differ in size. The target holds the ignore index where there is no label, and the prediction a class there, too:
    the metric leaves these pixels out, as those of torchmetrics with ``ignore_index=255`` do. Both are copies.

    Optional: ``reset()`` returns to the state before the first update. ``merge_processes()`` makes the state that of
    all processes of ``torch.distributed``, of which each sees some of the images; metrics of torchmetrics do so
    themselves.
    """

    def update(self, prediction: Tensor, target: Tensor, /) -> object:
        """Add the predicted and the true class map of an image."""

    def compute(self) -> Any:
        """Return a number, a vector of numbers, or a mapping of names to these."""
