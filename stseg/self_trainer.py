"""ST and ST++, told as the paper tells them (Yang et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from stseg.augment import StrongAugment
from stseg.data import MixedDataset
from stseg.data.items import len_of
from stseg.engine.config import TrainConfig
from stseg.errors import DataError
from stseg.functional._checks import check_classes
from stseg.functional.thresholds import check_threshold, leaves_out
from stseg.inference.labeler import check_stored
from stseg.inference.preflight import check_pace, check_strong, refuse_common_ids
from stseg.inference.ranking import reliable_count
from stseg.models.multi_scale import MultiScaleFlip
from stseg.stages.result import SelfTrainingResult
from stseg.stages.stages import Images, Ranker, Stages, StageSettings
from stseg.stages.workdir import Workdir
from stseg.storage.records import describe
from stseg.training import FitResult
from stseg.types import BatchAugmentation

FROM_SCRATCH: Mapping[str, Any] = MappingProxyType({"student_init": "teacher", "keep_per_class": 0.8})
"""Options of :class:`SelfTrainer` for networks that begin from nothing, in place of the paper's, which ask for
pretrained ones: ``SelfTrainer(..., **FROM_SCRATCH)``. What they gave where they were measured stands in the
documentation, under Results."""


class SelfTrainer:
    """Trains a network on few labeled and many unlabeled images.

    - ``"supervised"``: on the labeled images alone; the baseline, and the teacher of the other two.
    - ``"st"``: the teacher labels all images; a student learns from true and pseudo-masks, the latter under strong
      augmentation (section 3.2).
    - ``"st++"``: the images on whose masks the teacher settled early in its training are labeled first; a student
      that learned from those labels the rest (section 3.3).

    Every stage trains a network of its own. With a ``workdir`` each step is written there as soon as it is done,
    training, ranking and labeling also while under way, and the same call again goes on from where it was killed.
    Under ``torchrun`` or ``accelerate launch`` the processes share all the work.

    Args:
        make_model: makes a fresh network, bare or wrapped, each time it is called; its random initial weights come
            from the seed.
        num_classes: number of classes.
        config: settings of every training stage.
        method: ``"supervised"``, ``"st"`` or ``"st++"``.
        teacher: ``"final"``, or ``"best"`` for the weights of each stage that were best on ``val``, as the
            paper's runs took them; that lets validation labels into the training.
        reliable_fraction: share of the images that count as reliable; of n, the first ``floor(n * fraction)``.
        strong: augmentation of pseudo-labeled images; None for none.
        tta: wraps a network for labeling; None labels at one scale, in a fifteenth of the time.
        threshold: pixels whose confidence is below it are ignored in pseudo-masks; one value, or one for each class.
            The paper keeps all (0).
        keep_per_class: share of the pixels predicted as a class that is kept, in place of ``threshold``. At each
            labeling thresholds are found for its images, which are seen once more for that.
        student_init: ``"fresh"``, the paper's, or ``"teacher"``: a student begins with the weights of the network that
            labeled last. The second one of ST++ so begins with those of the first.
        ranker: ranks the images in place of their stability: any object with ``.rank(dataset) -> Ranking``.
        ignore_index: mask value of pixels that do not count.
        inference_batch_size: how many images of equal size are labeled or ranked at once.
        skip_unreadable: whether to leave out unlabeled images that cannot be read; they are listed in the result.
        workdir: folder that keeps everything; None keeps results in memory.
        save_every: seconds between saves of a training that is under way.
        progress: whether to show bars.

    Raises:
        ValueError: if an argument makes no sense; names it.

    Example:
        >>> import torch
        >>> images = [torch.rand(3, 16, 16) for _ in range(6)]
        >>> labeled = [(image, (image[0] > 0.5).to(torch.uint8)) for image in images[:2]]
        >>> trainer = SelfTrainer(
        ...     lambda: nn.Conv2d(3, 2, 1),
        ...     num_classes=2,
        ...     config=TrainConfig(steps=3, batch_size=2, crop_size=16),
        ...     progress=False,
        ... )
        >>> result = trainer.fit(labeled, images[2:])
        >>> list(result.seconds)
        ['teacher', 'ranking', 'reliable', 'student-1', 'unreliable', 'student-2']
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        *,
        num_classes: int,
        config: TrainConfig,
        method: Literal["supervised", "st", "st++"] = "st++",
        teacher: Literal["final", "best"] = "final",
        reliable_fraction: float = 0.5,
        strong: BatchAugmentation | None = StrongAugment(),  # noqa: B008  it holds settings alone
        tta: Callable[[nn.Module], nn.Module] | None = MultiScaleFlip,
        threshold: float | Sequence[float] | Tensor = 0.0,
        keep_per_class: float | None = None,
        student_init: Literal["fresh", "teacher"] = "fresh",
        ranker: Ranker | None = None,
        ignore_index: int = 255,
        inference_batch_size: int = 8,
        skip_unreadable: bool = False,
        workdir: str | Path | None = None,
        save_every: float = 60.0,
        progress: bool = True,
    ) -> None:
        if isinstance(make_model, nn.Module):
            raise TypeError(
                "make_model is a network; expected a function that makes a fresh one for each stage, "
                "such as lambda: smp.Unet(...)"
            )
        if method not in ("supervised", "st", "st++"):
            raise ValueError(f"method is {method!r}; expected 'supervised', 'st' or 'st++'")
        if teacher not in ("final", "best"):
            raise ValueError(f"teacher is {teacher!r}; expected 'final' or 'best'")
        if not 0 < reliable_fraction < 1:
            raise ValueError(f"reliable_fraction is {reliable_fraction}; expected a share between 0 and 1")
        if student_init not in ("fresh", "teacher"):
            raise ValueError(f"student_init is {student_init!r}; expected 'fresh' or 'teacher'")
        check_classes(num_classes, ignore_index)
        threshold = check_threshold(threshold, num_classes)
        if keep_per_class is not None and not 0 < keep_per_class <= 1:
            raise ValueError(f"keep_per_class is {keep_per_class}; expected a share in (0, 1], or None")
        if keep_per_class is not None and leaves_out(threshold):
            raise ValueError(f"threshold is {threshold} and keep_per_class {keep_per_class}; expected one of the two")
        if workdir is not None and (keep_per_class is not None or leaves_out(threshold)):
            check_stored(ignore_index)
        if method == "st++" and (config.epochs or config.steps or 0) < 3:
            raise ValueError(
                "method 'st++' keeps three checkpoints of the teacher; expected 3 epochs (or steps) or more"
            )
        check_strong(strong, ignore_index)
        check_pace(inference_batch_size, save_every)
        for name, value, needed in (("tta", tta, "__call__"), ("ranker", ranker, "rank")):
            if value is not None and not callable(getattr(value, needed, None)):
                raise TypeError(f"{name} is {value!r}; expected None or an object with the method {needed!r}")
        self.method = method
        self.reliable_fraction = reliable_fraction
        self.workdir = workdir
        self.settings = StageSettings(
            make_model=make_model,
            num_classes=num_classes,
            config=config,
            strong=strong,
            tta=tta,
            threshold=threshold,
            keep_per_class=keep_per_class,
            student_init=student_init,
            keep=teacher,
            ranker=ranker,
            ignore_index=ignore_index,
            inference_batch_size=inference_batch_size,
            skip_unreadable=skip_unreadable,
            save_every=save_every,
            progress=progress,
        )

    def fit(
        self,
        labeled: Dataset[Any],
        unlabeled: Dataset[Any] | None = None,
        val: Dataset[Any] | None = None,
        *,
        teacher: FitResult | None = None,
    ) -> SelfTrainingResult:
        """Run the method.

        All data sets, the network and the settings are looked at before any training.

        Args:
            labeled: items ``(image, mask)``.
            unlabeled: items are images, or tuples that begin with one; what follows is never looked at.
            val: items ``(image, mask)``, evaluated while training. They choose nothing, unless ``teacher="best"``.
            teacher: a supervised stage of an earlier run, such as ``result.stages["teacher"]``; none is trained then.
                Its network is on the CPU once students train.

        Raises:
            DataError: if a data set is empty, an id is in two of them, or an item is not what it has to be; names it.
            NetworkError: if the network does not give logits of ``num_classes`` classes.
            ValueError: if arguments and data do not go together.
            WorkdirMismatchError: if the work directory was made with other settings or data.
            TrainingDivergedError: if a loss becomes NaN or infinite.
        """
        run, images = self._prepared(labeled, unlabeled, val, teacher)
        config = self.settings.config
        if teacher is None:
            twice = len_of(labeled) < config.double_below
            teacher = run.train("teacher", MixedDataset(labeled, repeat=2 if twice else 1), thirds(config))
        if self.method == "supervised":
            return run.result(teacher)
        if self.method == "st":
            labels = run.label("labels", teacher, images)
            return run.result(run.train("student", MixedDataset(labeled, labels), teacher=teacher))
        reliable, rest = run.rank("ranking", teacher, images).split(self.reliable_fraction)
        easy = run.label("reliable", teacher, Subset(images, reliable))
        student = run.train("student-1", MixedDataset(labeled, easy), teacher=teacher)
        hard = run.label("unreliable", student, Subset(images, rest))
        return run.result(run.train("student-2", MixedDataset(labeled, ConcatDataset([easy, hard])), teacher=student))

    def _prepared(
        self,
        labeled: Dataset[Any],
        unlabeled: Dataset[Any] | None,
        val: Dataset[Any] | None,
        teacher: FitResult | None,
    ) -> tuple[Stages, Images]:
        """Everything that can be found wrong is found here: the cheap things first, and nothing is trained before."""
        settings = self.settings
        if settings.keep == "best" and val is None:
            raise ValueError("teacher='best' needs a validation set (val) to tell which weights are best")
        if unlabeled is None and self.method != "supervised":
            raise ValueError(f"method {self.method!r} needs unlabeled images")
        if teacher is not None and not isinstance(teacher, FitResult):
            raise TypeError(
                f"teacher is {type(teacher).__name__}; expected a FitResult, such as result.stages['teacher']"
            )
        if self.method == "st++" and teacher is not None and len(teacher.snapshots) < 2 and settings.ranker is None:
            raise ValueError(
                f"method 'st++' ranks by the teacher's snapshots; the teacher has {len(teacher.snapshots)}, "
                "expected two or more (train it with method='st++', or fit(..., snapshots=...))"
            )
        refuse_common_ids({"labeled": labeled, "unlabeled": unlabeled, "validation": val})
        if unlabeled is not None:
            self._check_count(len_of(unlabeled))
        run = Stages(settings, Workdir(self.workdir, self._described()), val)
        images = run.check(labeled, unlabeled, teacher)
        if images is None or self.method == "supervised":
            return run, Images(labeled, [], [])
        self._check_count(len(images))  # without those that were left out
        return run, images

    def _check_count(self, images: int) -> None:
        if not images and self.method != "supervised":
            raise DataError("the unlabeled data set is empty")
        if self.method == "st++" and not 0 < reliable_count(images, self.reliable_fraction) < images:
            raise DataError(
                f"{images} unlabeled images with reliable_fraction {self.reliable_fraction} leave none reliable "
                "or none unreliable; expected at least one of each"
            )

    def _described(self) -> dict[str, Any]:
        s = self.settings
        # What goes beyond the paper only where it is asked for: folders made before there was such a choice stay valid.
        beyond: dict[str, Any] = {"threshold": 0.0, "keep_per_class": None, "student_init": "fresh"}
        return {
            "method": self.method,
            "teacher": s.keep,
            "reliable_fraction": self.reliable_fraction,
            "num_classes": s.num_classes,
            "ignore_index": s.ignore_index,
            "config": s.config.record(),
            "strong": describe(s.strong),
            "tta": describe(s.tta),
            "ranker": describe(s.ranker),
            "skip_unreadable": s.skip_unreadable,
            **{name: getattr(s, name) for name, usual in beyond.items() if getattr(s, name) != usual},
        }


def thirds(config: TrainConfig) -> list[int]:
    """After which epochs (or steps) ST++ keeps a checkpoint: a third, two thirds and all of them; none of fewer than 3.

    Example:
        >>> thirds(TrainConfig(epochs=80)), thirds(TrainConfig(steps=4))
        ([26, 53, 80], [1, 2, 4])
    """
    length = config.epochs or config.steps or 0
    return [length // 3, 2 * length // 3, length] if length >= 3 else []
