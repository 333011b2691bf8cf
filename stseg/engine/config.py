"""How a stage is trained: the settings of the paper, and what may differ from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Literal

from stseg.augment import WeakAugment
from stseg.types import Precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training stage.

    Args:
        epochs: how often the data set is gone through. Either this or ``steps``.
        steps: number of iterations in its place, so that stages of different sizes can be given equal work.
        batch_size: images of a step, over all devices together.
        crop_size: what the weak augmentation crops: a side or ``(height, width)``, in pixels.
        base_size: long side that ``scale`` multiplies, in pixels; ``None`` takes that of each image.
        scale: smallest and largest factor of the weak augmentation.
        flip: its probability of a mirror image.
        lr: learning rate of the backbone. It falls by ``(1 - step / steps) ** power`` after every step.
        head_lr_factor: the rest of the network learns at ``head_lr_factor * lr``. A network in which no
            backbone is found learns at ``lr`` as a whole.
        backbone: name of the submodule that is the backbone, such as ``"model.encoder"``; ``None`` takes
            ``encoder``, ``backbone`` or what ``base_model_prefix`` names.
        optimizer: ``"sgd"`` or ``"adamw"``.
        momentum: of SGD.
        weight_decay: of either.
        power: exponent of the schedule.
        pseudo_weight: lambda, the weight of the pixels of pseudo-labeled images in the loss
            ``(sum over labeled pixels + lambda * sum over pseudo-labeled pixels) / number of pixels``, in which all
            pixels of the batch are counted that are not ignored, over all devices. At 1, the paper's, it is the one
            mean over the mixed batch; at 0 only true masks are learned from.
        sync_batchnorm: whether batch normalization takes its statistics from the images of all processes; the paper
            leaves it open. Changes nothing in a single process.
        precision: ``"fp32"``, or ``"bf16"`` for bfloat16 autocast with float32 weights.
        double_below: a supervised stage with fewer labeled images than this takes each twice an epoch.
        num_workers: processes that read and augment, per device. They do not change the result.
        seed: of everything random in the stage.

    Raises:
        ValueError: if a setting makes no sense; it names the setting.

    Example:
        >>> TrainConfig(steps=6000, batch_size=8, crop_size=(96, 128), lr=1e-3, optimizer="adamw").epochs is None
        True
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    crop_size: int | tuple[int, int] = 321
    base_size: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    lr: float = 0.001
    head_lr_factor: float = 10.0
    backbone: str | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    pseudo_weight: float = 1.0
    sync_batchnorm: bool = False
    precision: Precision = "fp32"
    double_below: int = 200
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; expected one of the two")
        for name in ("epochs", "steps", "batch_size", "base_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
        if not isinstance(self.seed, int) or not isinstance(self.num_workers, int) or self.num_workers < 0:
            raise ValueError(
                f"seed is {self.seed!r} and num_workers {self.num_workers!r}; expected integers, workers >= 0"
            )
        for name in ("lr", "head_lr_factor", "momentum", "weight_decay", "power", "pseudo_weight", "double_below"):
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a number")
        for name in ("lr", "head_lr_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("momentum", "weight_decay", "power", "pseudo_weight", "double_below"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not isinstance(self.sync_batchnorm, bool):
            raise ValueError(f"sync_batchnorm is {self.sync_batchnorm!r}; expected True or False")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer is {self.optimizer!r}; expected 'sgd' or 'adamw'")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; expected 'fp32' or 'bf16'")

        self.weak_augment()  # which looks at its own settings

    def weak_augment(self, ignore_index: int = 255) -> WeakAugment:
        """The weak augmentation of these settings.

        Example:
            >>> TrainConfig(epochs=1, crop_size=32).weak_augment().crop_size
            (32, 32)
        """
        return WeakAugment(
            self.crop_size, base_size=self.base_size, scale=self.scale, flip=self.flip, ignore_index=ignore_index
        )

    @classmethod
    def pascal(cls, *, batch_size: int = 16, **changes: Any) -> TrainConfig:
        """The paper's settings for Pascal VOC 2012 (Yang et al., CVPR 2022, section 4.1).

        Args:
            batch_size: the learning rate follows it: 0.001 for 16.
            changes: other settings, such as ``head_lr_factor=1`` for DeepLabV2.

        Example:
            >>> TrainConfig.pascal(batch_size=8).lr
            0.0005
        """
        return cls._paper(batch_size, changes, epochs=80, lr=0.001, crop_size=321, base_size=400)

    @classmethod
    def cityscapes(cls, *, batch_size: int = 16, **changes: Any) -> TrainConfig:
        """The paper's settings for Cityscapes; arguments as those of :meth:`pascal`, learning rate 0.004 for 16.

        Example:
            >>> TrainConfig.cityscapes().crop_size
            721
        """
        return cls._paper(batch_size, changes, epochs=240, lr=0.004, crop_size=721, base_size=2048)

    @classmethod
    def _paper(cls, batch_size: int, changes: dict[str, Any], *, lr: float, **settings: Any) -> TrainConfig:
        if changes.get("steps") is not None:
            settings["epochs"] = None
        settings |= {"batch_size": batch_size, "lr": lr * batch_size / 16, **changes}
        return cls(**settings)

    def record(self) -> dict[str, Any]:
        """What the result depends on, which is all but the workers.

        What goes beyond the paper is there only where it is asked for: records that were made before there was such a
        choice stay valid.

        Example:
            >>> [TrainConfig(steps=1, pseudo_weight=weight).record().get("pseudo_weight") for weight in (1.0, 0.5)]
            [None, 0.5]
        """
        beyond = {"pseudo_weight": 1.0, "sync_batchnorm": False}
        settings = asdict(self)
        return {k: v for k, v in settings.items() if k != "num_workers" and not (k in beyond and v == beyond[k])}

    def with_seed(self, seed: int) -> TrainConfig:
        """The same settings with another seed."""
        return replace(self, seed=seed)
