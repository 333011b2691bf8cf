"""Settings of a training stage: its length and batches, its optimization, its execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch

from stseg.augment import WeakAugment, as_pair_transform
from stseg.checks import check_choice, check_nonnegative, check_number
from stseg.description import describe
from stseg.models.precision import resolve_precision
from stseg.types import PairTransform, Precision

ParameterGroups: TypeAlias = list[dict[str, Any]]
"""Parameters with their learning rates, as torch's optimizers take them: ``[{"params": [...], "lr": 0.001}, ...]``."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training stage.

    Length and batches:

    Args:
        epochs: passes over the data set; with two streams, over the longer one. Either this or ``steps``.
        steps: number of iterations, so that stages on data sets of different sizes take equally long.
        batch_size: labeled images per step, over all processes.
        unlabeled_batch_size: unlabeled images per step; None uses ``batch_size``.
        weak: augmentation of every training image: a :class:`stseg.WeakAugment`, a torchvision v2 transform,
            :func:`stseg.augment.from_albumentations`, or any function ``(image, mask) -> (image, mask)``. All results
            must have the same size. None uses items as they are.
        ignore_index: mask value of pixels without a label.
        seed: seed of all random numbers of the stage.
        optimizer: ``"sgd"``, ``"adamw"``, or a function of parameter groups that returns an optimizer, such as
            ``functools.partial(torch.optim.RAdam, weight_decay=0.01)``. Learning rates come from the groups.
        lr: learning rate of the backbone.
        head_lr_factor: learning rate of everything but the backbone, as a multiple of ``lr``. A network in which no
            backbone is found learns at ``lr``.
        backbone: name of the backbone submodule, such as ``"model.encoder"``; None uses ``encoder``, ``backbone`` or
            the one that ``base_model_prefix`` names.
        momentum: momentum of ``"sgd"``.
        weight_decay: weight decay of ``"sgd"`` and ``"adamw"``.
        power: exponent of the schedule: all learning rates are multiplied by ``(1 - step / steps) ** power``.
        schedule: ``(step, steps) -> factor``, in place of the polynomial schedule.
        sync_batchnorm: whether batch normalization uses the statistics of all processes. No effect in a single
            process.
        precision: ``"bf16"`` for bfloat16 autocast with float32 weights, ``"fp32"`` for none, or ``"auto"`` for
            bfloat16 where the device computes it natively. Records hold which of the two it was.
        num_workers: worker processes per device; does not change the result.
        eval_batch_size: batch size of evaluation, labeling and ranking.
        eval_every: epochs (steps if the length is given in steps) between rows of the history, each with validation;
            there is always one at the end. None: every epoch, or about twenty rows.
        save_every: seconds between saves of the training state.

    Raises:
        ValueError: if a setting is out of its range; names it.

    Example:
        >>> config = TrainConfig(steps=6000, batch_size=8, weak=WeakAugment((96, 128)), lr=1e-3, optimizer="adamw")
        >>> config.epochs is None
        True
    """

    # Length and batches
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    unlabeled_batch_size: int | None = None
    weak: PairTransform | None = WeakAugment(321)  # noqa: RUF009  frozen
    ignore_index: int = 255
    seed: int = 0

    # Optimization
    optimizer: Literal["sgd", "adamw"] | Callable[[ParameterGroups], torch.optim.Optimizer] = "sgd"
    lr: float = 0.001
    head_lr_factor: float = 10.0
    backbone: str | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    schedule: Callable[[int, int], float] | None = None

    # Execution
    sync_batchnorm: bool = False
    precision: Precision = "auto"
    num_workers: int = field(default=0, metadata={"record": False})
    eval_batch_size: int = field(default=8, metadata={"record": False})
    eval_every: int | None = None
    save_every: float = field(default=60.0, metadata={"record": False})

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; expected one of the two")
        for name in ("epochs", "steps", "batch_size", "unlabeled_batch_size", "eval_batch_size", "eval_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
        if not isinstance(self.seed, int) or not isinstance(self.num_workers, int) or self.num_workers < 0:
            raise ValueError(
                f"seed is {self.seed!r} and num_workers {self.num_workers!r}; expected integers, workers >= 0"
            )
        for name in ("lr", "head_lr_factor"):
            check_number(name, getattr(self, name))
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("momentum", "weight_decay", "power", "save_every"):
            check_nonnegative(name, getattr(self, name))
        if isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer is an optimizer; expected a function that makes one of parameter groups, "
                "such as functools.partial(torch.optim.RAdam, weight_decay=0.01)"
            )
        if self.optimizer not in ("sgd", "adamw") and not callable(self.optimizer):
            raise ValueError(
                f"optimizer is {self.optimizer!r}; expected 'sgd', 'adamw' or a function of parameter groups, "
                "such as functools.partial(torch.optim.RAdam, weight_decay=0.01)"
            )
        check_choice("precision", self.precision, "auto", "fp32", "bf16")
        written = getattr(self.weak, "ignore_index", self.ignore_index)
        if written != self.ignore_index:
            raise ValueError(
                f"weak pads masks with {written}, but ignore_index is {self.ignore_index}; "
                f"expected weak=WeakAugment(..., ignore_index={self.ignore_index})"
            )
        object.__setattr__(self, "weak", as_pair_transform(self.weak, ignore_index=self.ignore_index))

    @property
    def length(self) -> int:
        """Number of epochs, or of steps if the length is given in steps."""
        return self.epochs or self.steps or 0

    @classmethod
    def pascal(cls, *, batch_size: int = 16, **changes: Any) -> TrainConfig:
        """Return the settings of ST and ST++ for Pascal VOC 2012 (Yang et al., CVPR 2022, section 4.1).

        Args:
            batch_size: the learning rate is proportional to it: 0.001 for 16.
            changes: other settings, such as ``head_lr_factor=1`` for DeepLabV2.

        Example:
            >>> TrainConfig.pascal(batch_size=8).lr
            0.0005
        """
        weak = WeakAugment(321, base_size=400)
        return cls._paper(changes, epochs=80, batch_size=batch_size, lr=0.001 * batch_size / 16, weak=weak)

    @classmethod
    def cityscapes(cls, *, batch_size: int = 16, **changes: Any) -> TrainConfig:
        """Return the settings for Cityscapes; as :meth:`pascal`, with a learning rate of 0.004 for 16 images.

        Example:
            >>> TrainConfig.cityscapes().weak.crop_size
            (721, 721)
        """
        weak = WeakAugment(721, base_size=2048)
        return cls._paper(changes, epochs=240, batch_size=batch_size, lr=0.004 * batch_size / 16, weak=weak)

    @classmethod
    def unimatch_v2(cls, **changes: Any) -> TrainConfig:
        """Return the settings of UniMatch V2 for Pascal VOC 2012, with a ViT (Yang et al., TPAMI 2025).

        AdamW with a learning rate of 5e-6 for the backbone and 40 times that for the rest, 60 epochs, 16 + 16 crops of
        518. The learning rate is the same for any batch size: for Cityscapes ``epochs=180, batch_size=8,
        weak=WeakAugment(798)``.

        Args:
            changes: other settings.

        Example:
            >>> config = TrainConfig.unimatch_v2(batch_size=8)
            >>> config.optimizer, config.lr, config.head_lr_factor * config.lr, config.weight_decay
            ('adamw', 5e-06, 0.0002, 0.01)
        """
        weak = WeakAugment(518)
        optimization = {"optimizer": "adamw", "lr": 5e-6, "head_lr_factor": 40.0, "weight_decay": 0.01}
        return cls._paper(changes, epochs=60, batch_size=16, weak=weak, **optimization)

    @classmethod
    def _paper(cls, changes: dict[str, Any], **settings: Any) -> TrainConfig:
        if changes.get("steps") is not None:
            settings["epochs"] = None
        return cls(**{**settings, **changes})

    def provenance(self) -> dict[str, Any]:
        """Return the settings that the result depends on, JSON-serializable."""
        recorded = [each.name for each in fields(self) if each.metadata.get("record", True)]
        return {name: describe(getattr(self, name)) for name in recorded}

    def on(self, device: torch.device) -> TrainConfig:
        """Return the same settings with the precision that they have on a device in place of ``"auto"``."""
        return replace(self, precision=resolve_precision(self.precision, device))

    def with_seed(self, seed: int) -> TrainConfig:
        """Return the same settings with another seed."""
        return replace(self, seed=seed)
