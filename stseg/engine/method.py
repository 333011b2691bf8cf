"""Interface between a training method and the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stseg.description import describe
from stseg.engine.config import TrainConfig
from stseg.engine.optimizers import build_optimizer
from stseg.models.state import fingerprint
from stseg.types import PairTransform


class Batch(NamedTuple):
    """Training data of one process for one step, on its device.

    In a custom training loop, set the fields that the method uses.
    """

    images: Tensor
    """``(B, C, H, W)`` float in [0, 1], weakly augmented."""
    masks: Tensor
    """``(B, H, W)`` int64, ``ignore_index`` where there is no label."""
    is_pseudo: Tensor
    """``(B,)`` bool: rows whose mask was predicted, not annotated."""
    unlabeled: Any = None
    """``(B', C, H, W)`` float weak crops of the unlabeled stream (or what :meth:`Method.view` made, collated); None
    without unlabeled images."""
    valid: Tensor | None = None
    """``(B', H, W)`` bool: False where a crop was padded."""
    step: int = 0
    """Number of this step, from 0."""
    steps: int = 1
    """Length of the training in steps."""
    ignore_index: int = 255
    """Mask value of pixels without a label."""


class Losses(NamedTuple):
    """Losses of a batch."""

    total: Tensor
    """The scalar to differentiate. Its mean over the processes is the loss of the whole batch."""
    logged: dict[str, Tensor] = {}  # noqa: RUF012  never written to
    """Detached scalars by name, such as the parts of the loss: for history, progress bar, report and ``log=``."""


class Method(nn.Module):
    """Base class of training methods.

    A method is a module that holds its networks and maps a :class:`Batch` to :class:`Losses`. Everything that changes
    from step to step is a parameter, a buffer or a submodule of it, so that its state dict is its whole state: the
    engine moves it to the device, saves it, resumes it and distributes it. All random numbers come from torch's
    generators. It need not deal with devices, files, processes or precision. Set ``model`` and implement
    ``forward``; the other methods are optional.

    Example:
        >>> from stseg.functional import cross_entropy, entropy
        >>> class EntropyMinimization(Method):
        ...     def __init__(self, network, *, weight=0.1):
        ...         super().__init__()
        ...         self.model = stseg.Segmenter(network)
        ...         self.weight = weight
        ...
        ...     def forward(self, batch):
        ...         supervised = cross_entropy(self.model(batch.images), batch.masks)
        ...         uncertainty = entropy(self.model(batch.unlabeled), where=batch.valid)
        ...         return Losses(supervised + self.weight * uncertainty, {"entropy": uncertainty.detach()})
        >>> import stseg
        >>> method = EntropyMinimization(nn.Conv2d(3, 2, 1))
        >>> labeled = [(torch.rand(3, 20, 20), torch.randint(2, (20, 20))) for _ in range(3)]
        >>> unlabeled = [torch.rand(3, 24, 20) for _ in range(5)]
        >>> config = stseg.TrainConfig(steps=2, batch_size=2, weak=stseg.WeakAugment(16))
        >>> result = stseg.fit(method, labeled, config, unlabeled=unlabeled, progress=False)
        >>> sorted(result.history[0])
        ['entropy', 'epoch', 'loss', 'lr', 'seconds', 'step']
    """

    model: nn.Module
    """``(B, C, H, W)`` images to ``(B, K, H, W)`` logits: the model that is validated, saved and returned."""

    uses_unlabeled: ClassVar[bool] = True
    """Whether the method learns from the unlabeled stream. If True, training without one raises an error."""

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses of a batch, in training mode under autocast. All that needs gradients belongs here."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(batch) -> Losses")

    def after_step(self, batch: Batch) -> None:
        """Update state that is not learned by gradients, such as moving averages; called after each optimizer step."""

    def optimizers(self, config: TrainConfig) -> Sequence[torch.optim.Optimizer]:
        """Build the optimizers, which together hold every trainable parameter exactly once.

        By default a single one, with separate learning rates for backbones and heads. All learning rates follow
        ``config.schedule``.
        """
        return [build_optimizer(self, config)]

    def view(self, image: Tensor, weak: PairTransform) -> tuple[Any, Tensor | None]:
        """Make the view of one unlabeled image; called in the data-loading workers.

        Args:
            image: ``(C, H, W)`` uint8 or float in [0, 1].
            weak: the weak augmentation, ``(image, mask) -> (image, mask)``.

        Returns:
            Tensors in any nesting of tuples, lists and dictionaries, stacked to ``batch.unlabeled``; and ``(H, W)``
            bool, stacked to ``batch.valid``, or None. By default one weak crop, and which of its pixels are not
            padding. uint8 tensors are converted to float in [0, 1] on the device.
        """
        return weak_crop(image, weak)


def weak_crop(image: Tensor, weak: PairTransform) -> tuple[Tensor, Tensor]:
    """Return one weak crop of an image, and which of its pixels are not padding."""
    crop, mask = weak(image, torch.zeros(image.shape[-2:], dtype=torch.uint8))
    return crop, mask == 0


def provenance_of(method: Method) -> dict[str, dict[str, Any]]:
    """Return the settings of a method and the architecture of its networks, JSON-serializable.

    Settings are the attributes, and the modules without parameters, whose names do not begin with an underscore.

    Example:
        >>> from stseg.methods import Supervised
        >>> provenance_of(Supervised(nn.Conv2d(3, 2, 1), pseudo_weight=0.5))["method"]
        {'type': 'Supervised', 'strong': None, 'pseudo_weight': 0.5, 'loss': None}
    """
    networks = {name: child for name, child in method.named_children() if next(child.parameters(), None) is not None}
    settings = {
        name: describe(value)
        for name, value in {**vars(method), **dict(method.named_children())}.items()
        if name not in networks and not name.startswith("_") and name != "training"
    }
    found = {name: fingerprint(network, weights=False) for name, network in networks.items()}
    model = fingerprint(method.model, weights=False)
    if model not in found.values():  # it is a part of one of them
        found["model"] = model
    return {"method": {"type": type(method).__qualname__, **settings}, "network": found}


def view_of(method: Method) -> Callable[[Tensor, PairTransform], tuple[Any, Tensor | None]]:
    """Return the method's own view, or :func:`weak_crop`, which spares the workers a copy of the weights."""
    return weak_crop if type(method).view is Method.view else method.view
