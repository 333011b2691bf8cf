"""ST and ST++ (Yang et al., CVPR 2022): self-training in two and three trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn
from torch.utils.data import ConcatDataset

from stseg.augment import StrongAugment, as_batch_augmentation
from stseg.checks import check_choice, check_nonnegative
from stseg.data import MixedDataset
from stseg.data.items import Items
from stseg.engine.config import TrainConfig
from stseg.engine.loop import FitResult
from stseg.errors import DataError
from stseg.inference.ranking import reliable_count
from stseg.methods.supervised import Supervised
from stseg.stages.labeling import Labeling
from stseg.stages.recipe import Recipe
from stseg.stages.stages import MakeMethod, MakeModel, Ranker, Stages
from stseg.types import BatchAugmentation, Criterion

AnyST = TypeVar("AnyST", bound="ST")


@dataclass(frozen=True, kw_only=True)
class Baseline(Recipe):
    """Supervised baseline, section 3.1: training on the labeled images alone; also the teacher of ST and ST++.

    Args:
        teacher: ``make_model -> Method`` in place of :class:`stseg.methods.Supervised`, such as
            ``lambda make_model: FixMatch(make_model())``.
        loss: supervised loss of every training, ``(logits, masks) -> scalar``; None for cross-entropy.
        double_below: fewer labeled images than this are repeated twice per epoch.

    Raises:
        ValueError: if a setting is out of its range; names it.
        TypeError: if a setting has the wrong type.

    Example:
        >>> Baseline(double_below=0).uses_unlabeled
        False
    """

    teacher: MakeMethod | None = None
    loss: Criterion | None = None
    double_below: int = 200

    uses_unlabeled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_nonnegative("double_below", self.double_below)
        check_make_method("teacher", self.teacher)

    def run(self, stages: Stages, labeled: Items, unlabeled: Items) -> FitResult:
        """Train the teacher."""
        return self.train_teacher(stages, labeled)

    def train_teacher(self, stages: Stages, labeled: Items) -> FitResult:
        """Train the step ``"teacher"``, keeping the three checkpoints by which ST++ ranks."""
        repeated = MixedDataset(labeled, repeat=2 if len(labeled) < self.double_below else 1)
        teacher = stages.train(
            "teacher", self.teacher or self.supervised, repeated, snapshots=thirds(stages.config.length)
        )
        self.check_trained(stages, teacher)
        return teacher

    def check_trained(self, stages: Stages, teacher: FitResult) -> None:
        """Check what can be told of the teacher before the images are labeled."""

    def supervised(self, make_model: MakeModel) -> Supervised:
        """Make the default method of the teacher."""
        return Supervised(make_model(), loss=self.loss)

    def check_images(self, count: int) -> None:
        """Accept any number: the images are not used."""

    def check_teacher(self, teacher: FitResult) -> None:
        """Accept any teacher."""


@dataclass(frozen=True, kw_only=True)
class ST(Baseline):
    """ST, section 3.2: the teacher labels all images, and a student learns from annotated and pseudo-masks.

    Args:
        strong: augmentation of pseudo-labeled images: :class:`stseg.StrongAugment`, a kornia
            ``AugmentationSequential``, or None for none.
        pseudo_weight: lambda, the weight of pseudo-labeled pixels.
        labeling: how pseudo-labels are made.
        student_init: ``"fresh"``, as in the paper, or ``"teacher"``: each student starts from the weights of the
            network that labeled its images; the second student of ST++ starts from the first.
        student: ``make_model -> Method`` in place of :class:`stseg.methods.Supervised`.
        teacher: see :class:`Baseline`, also for ``loss`` and ``double_below``.

    Example:
        >>> ST(student_init="teacher", labeling=Labeling(tta=None, threshold=0.9)).pseudo_weight
        1.0
    """

    strong: BatchAugmentation | None = StrongAugment()  # noqa: RUF009  it has no state
    pseudo_weight: float = 1.0
    labeling: Labeling = Labeling()  # noqa: RUF009  frozen
    student_init: Literal["fresh", "teacher"] = "fresh"
    student: MakeMethod | None = None

    uses_unlabeled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonnegative("pseudo_weight", self.pseudo_weight)
        check_make_method("student", self.student)
        if not isinstance(self.labeling, Labeling):
            raise TypeError(f"labeling is {self.labeling!r}; expected a Labeling, such as Labeling(tta=None)")
        check_choice("student_init", self.student_init, "fresh", "teacher")

    @classmethod
    def from_scratch(cls: type[AnyST], **changes: Any) -> AnyST:
        """Return settings for networks without pretrained weights; see Results in the documentation.

        Students start from their teacher's weights, and the most confident 80 % of each predicted class are kept.
        """
        return cls(**{"student_init": "teacher", "labeling": Labeling(keep_per_class=0.8), **changes})

    def run(self, stages: Stages, labeled: Items, unlabeled: Items) -> FitResult:
        """Run algorithm 1 of section 3.2."""
        teacher = self.train_teacher(stages, labeled)
        labels = stages.label("labels", teacher, unlabeled, self.labeling)
        return self.train_student(stages, "student", MixedDataset(labeled, labels), teacher)

    def check_trained(self, stages: Stages, teacher: FitResult) -> None:
        """Check that the students can start from the teacher's weights, if they are to."""
        if self.student_init == "teacher":
            with stages.initial_weights("check"):
                stages.new_model(teacher)

    def train_student(self, stages: Stages, step: str, mixed: MixedDataset, teacher: FitResult) -> FitResult:
        """Train a student on annotated and pseudo-masks."""
        init = teacher if self.student_init == "teacher" else None
        return stages.train(step, self.make_student(stages.config), mixed, init=init)

    def make_student(self, config: TrainConfig) -> MakeMethod:
        """Return the function that makes the method of a student."""

        def make(make_model: MakeModel) -> Supervised:
            return Supervised(
                make_model(),
                strong=self.strong,
                pseudo_weight=self.pseudo_weight,
                loss=self.loss,
                ignore_index=config.ignore_index,
            )

        return self.student or make

    def later_methods(self, config: TrainConfig) -> Mapping[str, MakeMethod]:
        """Return the method of the student."""
        return {"student": self.make_student(config)}

    def check_settings(self, config: TrainConfig, *, num_classes: int, on_disk: bool) -> None:
        """Check the labeling and the strong augmentation."""
        if self.student is None:
            as_batch_augmentation(self.strong, ignore_index=config.ignore_index)
        self.labeling.check(num_classes, config.ignore_index, on_disk=on_disk)

    def check_images(self, count: int) -> None:
        """Check that there is at least one."""
        Recipe.check_images(self, count)


@dataclass(frozen=True, kw_only=True)
class STPlusPlus(ST):
    """ST++, section 3.3: images whose predictions stabilized early in the teacher's training are labeled first.

    Args:
        reliable_fraction: share of reliable images: the first ``floor(n * fraction)`` of n.
        ranker: ranks the images in place of stability: any object with ``.rank(dataset) -> Ranking``.
        strong: see :class:`ST`, also for all other arguments.

    Example:
        >>> STPlusPlus(reliable_fraction=0.4).labeling.keep_per_class is None
        True
    """

    reliable_fraction: float = 0.5
    ranker: Ranker | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.reliable_fraction < 1:
            raise ValueError(f"reliable_fraction is {self.reliable_fraction}; expected a share between 0 and 1")
        if self.ranker is not None and not callable(getattr(self.ranker, "rank", None)):
            raise TypeError(f"ranker is {self.ranker!r}; expected None or an object with the method 'rank'")

    def run(self, stages: Stages, labeled: Items, unlabeled: Items) -> FitResult:
        """Run algorithm 2 of section 3.3."""
        teacher = self.train_teacher(stages, labeled)
        reliable, rest = stages.rank("ranking", teacher, unlabeled, self.ranker).split(self.reliable_fraction)
        easy = stages.label("reliable", teacher, unlabeled.subset(reliable), self.labeling)
        student = self.train_student(stages, "student-1", MixedDataset(labeled, easy), teacher)
        hard = stages.label("unreliable", student, unlabeled.subset(rest), self.labeling)
        return self.train_student(stages, "student-2", MixedDataset(labeled, ConcatDataset([easy, hard])), student)

    def check_settings(self, config: TrainConfig, *, num_classes: int, on_disk: bool) -> None:
        """Check the labeling, and that the training is long enough for three checkpoints."""
        super().check_settings(config, num_classes=num_classes, on_disk=on_disk)
        if not thirds(config.length):
            raise ValueError(
                "ST++ keeps three checkpoints of the teacher; "
                f"expected 3 epochs (or steps) or more, got {config.length}"
            )

    def check_images(self, count: int) -> None:
        """Check that both parts are non-empty."""
        super().check_images(count)
        if not 0 < reliable_count(count, self.reliable_fraction) < count:
            raise DataError(
                f"{count} unlabeled images with reliable_fraction {self.reliable_fraction} leave none reliable "
                "or none unreliable; expected at least one of each"
            )

    def check_teacher(self, teacher: FitResult) -> None:
        """Check that there are checkpoints to rank by."""
        if len(teacher.snapshots) < 2 and self.ranker is None:
            raise ValueError(
                f"ST++ ranks by the teacher's snapshots; the teacher has {len(teacher.snapshots)}, expected two or "
                "more (train it by SelfTrainer, or by fit(..., snapshots=...)), or a ranker that needs none, such as "
                "STPlusPlus(ranker=stseg.ConfidenceRanker(network, num_classes=...))"
            )


def check_make_method(name: str, make: object) -> None:
    """Raise a ``TypeError`` unless ``make`` is None or a function that makes a method."""
    if make is not None and (not callable(make) or isinstance(make, (type, nn.Module))):
        made = f"the class {make.__name__}" if isinstance(make, type) else repr(make)
        kind = type(make).__name__ if isinstance(make, nn.Module) else made
        raise TypeError(
            f"{name} is {kind}; expected a function make_model -> Method, "
            "such as lambda make_model: stseg.methods.FixMatch(make_model())"
        )


def thirds(length: int) -> list[int]:
    """Return after which epochs (or steps) ST++ keeps a checkpoint; empty if ``length`` is below 3.

    Example:
        >>> thirds(80), thirds(4)
        ([26, 53, 80], [1, 2, 4])
    """
    return [length // 3, 2 * length // 3, length] if length >= 3 else []
