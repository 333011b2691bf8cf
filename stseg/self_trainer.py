"""Self-training from end to end: a recipe, networks, settings and a work directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from stseg.checks import check_choice, check_class_names, check_log
from stseg.data.items import Items
from stseg.description import describe
from stseg.distributed import setup_device
from stseg.engine.checkpoint import RESERVED
from stseg.engine.config import TrainConfig
from stseg.engine.loop import FitResult
from stseg.engine.method import Method
from stseg.engine.watch import Log
from stseg.functional.classes import check_classes
from stseg.inference.extra_metrics import Metrics, check_history_metrics
from stseg.inference.preflight import refuse_common_ids
from stseg.methods.registry import create_method, list_methods
from stseg.models.segmenter import as_segmenter
from stseg.stages.recipe import OneStage, Recipe
from stseg.stages.result import SelfTrainingResult
from stseg.stages.stages import MakeMethod, Stages
from stseg.stages.validation import validate_run
from stseg.stages.workdir import Workdir
from stseg.storage.files import absolute_folder


class SelfTrainer:
    """Trainer of a network on few labeled and many unlabeled images.

    ``method`` is one of:

    - a recipe of several trainings: :class:`stseg.methods.ST`, :class:`stseg.methods.STPlusPlus` with their options;
    - one training by a method: ``lambda make_model: stseg.methods.FixMatch(make_model())``;
    - a name, such as ``"fixmatch"``: the method with its defaults; :func:`stseg.methods.list_methods` has all names.
      ``"supervised"`` trains on the labeled images alone.

    Every training uses new networks. With a ``workdir`` each step is saved on completion, long steps also
    periodically, and the same call again resumes where it was killed. Under ``torchrun`` or ``accelerate launch`` the
    processes share all the work.

    Args:
        make_model: makes a new network, bare or wrapped, at each call; its random initial weights depend on the
            seed.
        num_classes: number of classes; 2 for a network with one logit.
        config: settings of every training.
        method: a recipe, a function ``make_model -> Method``, or a name.
        keep: ``"final"``, or ``"best"`` for the best weights of each training on ``val``, as in the experiments of
            ST++; this leaks validation labels into the training.
        workdir: folder for all results; None keeps them in memory.
        skip_unreadable: whether to leave out unlabeled images that cannot be read; they are listed in the result.
        log: called with each row of each training's history, in the first process; the names are
            ``"<step>/<name>"``. See :func:`stseg.fit`.
        metrics: more metrics of ``val``, in every training's history; as for :func:`stseg.fit`.
        verify: which pseudo-masks on disk are opened when a run goes on: 10,000 of each labeling, ``"all"`` or
            ``"none"``; all of them are verified when they are read. See :class:`stseg.MaskStore`.
        progress: whether to show bars.
        class_names: name of each class in the report; they may change when a run goes on.

    Raises:
        ValueError: if an argument is out of its range; names it.

    Example:
        >>> import torch, stseg
        >>> images = [torch.rand(3, 16, 16) for _ in range(6)]
        >>> labeled = [(image, (image[0] > 0.5).to(torch.uint8)) for image in images[:2]]
        >>> trainer = SelfTrainer(
        ...     lambda: nn.Conv2d(3, 2, 1),
        ...     num_classes=2,
        ...     config=TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16)),
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
        method: Recipe | MakeMethod | str = "st++",
        keep: Literal["final", "best"] = "final",
        workdir: str | Path | None = None,
        skip_unreadable: bool = False,
        log: Log | Sequence[Log] | None = None,
        metrics: Metrics | None = None,
        verify: Literal["sample", "all", "none"] = "sample",
        progress: bool = True,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(make_model, nn.Module):
            raise TypeError(
                "make_model is a network; expected a function that makes a fresh one each time it is called, "
                "such as lambda: smp.Unet(...)"
            )
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config is {type(config).__name__}; expected a stseg.TrainConfig")
        check_log(log)
        check_history_metrics(metrics, RESERVED)
        check_classes(num_classes, config.ignore_index)
        check_choice("keep", keep, "final", "best")
        check_choice("verify", verify, "sample", "all", "none")
        check_class_names(class_names, num_classes)
        self.class_names = None if class_names is None else tuple(class_names)
        self.make_model, self.num_classes, self.config = make_model, num_classes, config
        self.recipe = _as_recipe(method, num_classes)
        self.keep, self.workdir, self.skip_unreadable = keep, absolute_folder(workdir), skip_unreadable
        self.log, self.metrics, self.verify, self.progress = log, metrics, verify, progress
        self.recipe.check_settings(config, num_classes=num_classes, on_disk=workdir is not None)

    def fit(
        self,
        labeled: Dataset[Any],
        unlabeled: Dataset[Any] | None = None,
        val: Dataset[Any] | None = None,
        *,
        teacher: FitResult | nn.Module | None = None,
    ) -> SelfTrainingResult:
        """Run all steps.

        All data sets, the network and the settings are validated, and a training step is tried, before training
        starts.

        Args:
            labeled: items ``(image, mask)`` or mappings with ``image`` and ``mask``.
            unlabeled: items are images, or tuples or mappings that contain one; all other parts are ignored.
            val: labeled items, evaluated during training. They do not affect the result unless ``keep="best"``.
            teacher: training of an earlier run by any method, such as ``result.stages["teacher"]``, or its network,
                such as that of :func:`stseg.load`, used instead of training one. It may be larger than those of
                ``make_model``. It is moved to the CPU when students train. ST++ ranks by its snapshots, which a network
                alone does not have.

        Raises:
            DataError: if a data set is empty, an id is in two of them, or an item is invalid; names it.
            NetworkError: if the network does not return logits of ``num_classes`` classes.
            MethodError: if a training step fails.
            MetricError: if one of ``metrics`` fails; names it.
            ValueError: if arguments and data do not match.
            WorkdirMismatchError: if the work directory was made with other settings or data.
            WorkdirInUseError: if another run is using it.
            WorkdirMissingError: if it is removed or moved meanwhile.
            DamagedFileError: if a file in it is damaged, or is not the one that was written; says what to delete.
            TrainingDivergedError: if a loss becomes NaN or infinite.
        """
        recipe = self.recipe
        if self.keep == "best" and val is None:
            raise ValueError("keep='best' needs a validation set (val) to tell which weights are best")
        if self.metrics and val is None:
            raise ValueError("metrics need a validation set (val) of which they are computed")
        if unlabeled is None and recipe.uses_unlabeled:
            raise ValueError(f"{type(recipe).__name__} learns from unlabeled images; expected fit(labeled, unlabeled)")
        if isinstance(teacher, Method):
            raise TypeError(f"teacher is the method {type(teacher).__name__}; expected its network: teacher.model")
        if isinstance(teacher, nn.Module):
            teacher = FitResult(as_segmenter(teacher).eval(), (), (), 0.0)
        if teacher is not None and not isinstance(teacher, FitResult):
            raise TypeError(
                f"teacher is {type(teacher).__name__}; expected a FitResult, such as result.stages['teacher'], or a "
                "network"
            )
        if teacher is not None:
            recipe.check_teacher(teacher)
        items, images, held_out = (None if data is None else Items.of(data) for data in (labeled, unlabeled, val))
        assert items is not None
        refuse_common_ids({"labeled": items, "unlabeled": images, "validation": held_out})
        if images is not None:
            recipe.check_images(len(images))
        config = self.config.on(setup_device())
        with Workdir(self.workdir, self._settings(config), class_names=self.class_names) as workdir:
            stages = Stages(
                self.make_model,
                self.num_classes,
                config,
                workdir,
                keep=self.keep,
                val=held_out,
                teacher=teacher,
                log=self.log,
                metrics=self.metrics,
                verify=self.verify,
                progress=self.progress,
                class_names=self.class_names,
            )
            methods, skip = recipe.later_methods(config), self.skip_unreadable
            readable = validate_run(stages, items, images, methods, recipe.labeling, skip_unreadable=skip)
            if readable is not None:
                recipe.check_images(len(readable))  # without those that were left out
            return stages.result(recipe.run(stages, items, readable if readable is not None else items.subset([])))

    def _settings(self, config: TrainConfig) -> dict[str, Any]:
        return {
            "method": describe(self.recipe),
            "num_classes": self.num_classes,
            "config": config.provenance(),
            "keep": self.keep,
            "skip_unreadable": self.skip_unreadable,
        }


def _as_recipe(method: object, num_classes: int) -> Recipe:
    if isinstance(method, str):
        return create_method(method, num_classes=num_classes)
    if isinstance(method, Recipe):
        return method
    if isinstance(method, (type, nn.Module)) or not callable(method):
        kind = getattr(method, "__name__", type(method).__name__)
        kind = f"the class {kind}" if isinstance(method, type) else kind
        raise ValueError(
            f"method is {kind}; expected a name ({', '.join(map(repr, list_methods()))}), a recipe such as "
            "stseg.methods.STPlusPlus(), or a function such as lambda make_model: stseg.methods.FixMatch(make_model())"
        )
    return OneStage(method)
