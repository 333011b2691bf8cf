"""Interface between a recipe, which orders training, labeling and ranking, and a durable run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stseg.data.items import Items
from stseg.engine.config import TrainConfig
from stseg.engine.loop import FitResult
from stseg.errors import DataError
from stseg.stages.labeling import Labeling
from stseg.stages.stages import MakeMethod, Stages


class Recipe:
    """Base class of training in several steps, such as :class:`stseg.methods.STPlusPlus`.

    Implement ``run``; the other methods are optional and called before training starts.

    Example:
        >>> import torch, stseg
        >>> from stseg.methods import Supervised
        >>> class Twice(Recipe):
        ...     uses_unlabeled = False
        ...
        ...     def run(self, stages, labeled, unlabeled):
        ...         first = stages.train("first", lambda make_model: Supervised(make_model()), labeled)
        ...         return stages.train("second", lambda make_model: Supervised(make_model()), labeled, init=first)
        >>> data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16))) for _ in range(3)]
        >>> config = stseg.TrainConfig(steps=2, batch_size=2, weak=None)
        >>> options = {"num_classes": 2, "config": config, "progress": False}
        >>> trainer = stseg.SelfTrainer(lambda: torch.nn.Conv2d(3, 2, 1), method=Twice(), **options)
        >>> list(trainer.fit(data).stages)
        ['first', 'second']
    """

    uses_unlabeled: ClassVar[bool] = True
    """Whether the recipe itself needs unlabeled images; a method of one of its trainings may need them too."""

    labeling: Labeling | None = None
    """How pseudo-labels are made; None if there are none."""

    def run(self, stages: Stages, labeled: Items, unlabeled: Items) -> FitResult:
        """Run all steps by ``stages.train``, ``stages.label`` and ``stages.rank``, and return the last training."""
        raise NotImplementedError(f"{type(self).__name__} must implement run(stages, labeled, unlabeled) -> FitResult")

    def later_methods(self, config: TrainConfig) -> Mapping[str, MakeMethod]:
        """Return the methods of the trainings after the first one, by step, to be tried before training starts."""
        return {}

    def check_settings(self, config: TrainConfig, *, num_classes: int, on_disk: bool) -> None:
        """Raise a ``ValueError`` if the recipe does not fit the settings."""

    def check_images(self, count: int) -> None:
        """Raise a ``DataError`` if there are too few unlabeled images."""
        if not count:
            raise DataError("the unlabeled data set is empty")

    def check_teacher(self, teacher: FitResult) -> None:
        """Raise a ``ValueError`` if a teacher trained elsewhere cannot take the place of the step ``"teacher"``."""
        raise ValueError(f"{type(self).__name__} trains no teacher; expected fit(...) without teacher=")


@dataclass(frozen=True)
class OneStage(Recipe):
    """Recipe of a single training, the step ``"train"``; :class:`stseg.SelfTrainer` makes it of a function.

    Args:
        method: ``make_model -> Method``, such as ``lambda make_model: CPS(make_model(), make_model())``.

    Example:
        >>> from stseg.methods import FixMatch
        >>> OneStage(lambda make_model: FixMatch(make_model())).uses_unlabeled  # its method says
        False
    """

    method: MakeMethod

    uses_unlabeled: ClassVar[bool] = False

    def run(self, stages: Stages, labeled: Items, unlabeled: Items) -> FitResult:
        """Train."""
        return stages.train("train", self.method, labeled)
