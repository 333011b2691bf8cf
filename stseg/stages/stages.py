"""Durable steps of a run: train, rank, label."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.data import Dataset

from stseg.data.items import Items
from stseg.description import describe
from stseg.distributed import all_gather, barrier, rank, setup_device
from stseg.engine.batches import Streams
from stseg.engine.checkpoint import copy_to_cpu
from stseg.engine.collapse import nothing_kept, vanished_classes
from stseg.engine.config import TrainConfig
from stseg.engine.loop import FitResult, run_stage
from stseg.engine.method import Method, view_of
from stseg.engine.trial import preserved_random_state
from stseg.engine.watch import Log
from stseg.errors import DamagedFileError, DataError, WorkdirMissingError
from stseg.functional.thresholds import check_threshold
from stseg.inference.class_counts import ClassCounts, count_classes
from stseg.inference.extra_metrics import Metrics
from stseg.inference.fingerprints import join_checksums
from stseg.inference.labeler import PseudoLabeled, PseudoLabeler
from stseg.inference.mask_store import MaskStore
from stseg.inference.rankers import StabilityRanker
from stseg.inference.ranking import Ranking
from stseg.inference.reading import Skipped
from stseg.models import Tiled
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, fingerprint, place
from stseg.models.summary import summarize_network
from stseg.progress import LOG, format_duration, warn_of_run
from stseg.seeds import derive_seed, fixed_seed
from stseg.stages.charts import Charts
from stseg.stages.labeling import Labeling
from stseg.stages.predictions import Predictions, predict_pictures, read_predictions, write_predictions
from stseg.stages.ranking_file import read_ranking, write_ranking
from stseg.stages.report import write_report
from stseg.stages.result import SelfTrainingResult
from stseg.stages.workdir import Workdir
from stseg.storage.files import misplaced
from stseg.storage.records import claim, write_record

MakeModel: TypeAlias = Callable[[], nn.Module]
"""Makes a new network at each call."""

MakeMethod: TypeAlias = Callable[[MakeModel], Method]
"""Makes a method with new networks: ``lambda make_model: FixMatch(make_model())``."""


class Ranker(Protocol):
    """Interface of rankers that can replace :class:`stseg.StabilityRanker` in a run."""

    def rank(self, dataset: Dataset[Any]) -> Ranking:
        """Rank all images of a data set, best first."""
        ...


class Stages:
    """Runner of the steps; results are kept in memory, and in the work directory if there is one.

    Args:
        make_model: makes a new network.
        num_classes: number of classes.
        config: settings of every training.
        workdir: folder of the run.
        keep: which weights each training returns.
        val: labeled items, evaluated during training.
        teacher: result of an earlier training, used in place of the step ``"teacher"``.
        log: what is called with each row of each history; the names are ``"<step>/<name>"``.
        metrics: more metrics of the validation, in every history.
        verify: which pseudo-masks a labeling that goes on opens; see :class:`stseg.MaskStore`.
        progress: whether to show bars.
        class_names: names of the classes in the report.
    """

    def __init__(
        self,
        make_model: MakeModel,
        num_classes: int,
        config: TrainConfig,
        workdir: Workdir,
        *,
        keep: Literal["final", "best"] = "final",
        val: Items | None = None,
        teacher: FitResult | None = None,
        log: Log | Sequence[Log] | None = None,
        metrics: Metrics | None = None,
        verify: Literal["sample", "all", "none"] = "sample",
        progress: bool = True,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.verify, self.class_names = verify, class_names
        self.make_model, self.num_classes, self.config, self.workdir = make_model, num_classes, config, workdir
        self.keep, self.val, self.log, self.metrics, self.progress = keep, val, log, metrics, progress
        self.device = setup_device()
        self.unlabeled: Items | None = None
        self.labeled_classes: ClassCounts | None = None
        self.trained: dict[str, FitResult] = {} if teacher is None else {"teacher": teacher}
        self.labeled: dict[str, PseudoLabeled] = {}
        self.labeled_by: dict[str, str] = {}
        self.ranking: Ranking | None = None
        self.skipped: tuple[Skipped, ...] = ()
        self.seconds: dict[str, float] = {}
        self.warnings: dict[str, tuple[str, ...]] = {}
        self._kept: list[tuple[str, str]] = []  # files beside those of trainings and labelings

    def train(
        self,
        step: str,
        make_method: MakeMethod,
        labeled: Dataset[Any],
        *,
        snapshots: Sequence[int] = (),
        init: FitResult | None = None,
    ) -> FitResult:
        """Train a method with new networks. Earlier networks are moved to the CPU.

        Args:
            step: name of the step.
            make_method: makes the method.
            labeled: the labeled stream. The unlabeled stream is that of the run, if the method uses it.
            snapshots: after which epochs or steps to keep a copy.
            init: training whose weights the networks start from; None for those of ``make_model``.
        """
        if step in self.trained:
            return self.trained[step]
        for earlier in self.trained.values():
            earlier.model.to("cpu")
        config = self.config.with_seed(derive_seed(self.config.seed, step))
        method = self.new_method(step, make_method, init)
        streams = self.streams(method, Items.of(labeled), config)
        self.trained[step] = run_stage(
            method,
            streams,
            config,
            facts={
                "items": streams.description(),
                "pseudo-labels": {s: d.store.origin for s, d in self.labeled.items()},
            },
            val=self.val,
            snapshots=snapshots,
            keep=self.keep,
            workdir=self.workdir.path(step),
            log=self.log,
            metrics=self.metrics,
            progress=self.progress,
            title=step,
            prefix=f"{step}/",
        )
        trained = self.trained[step]
        self._done(step, trained.seconds, trained.warnings, network=summarize_network(trained.model))
        return self.trained[step]

    def label(self, step: str, teacher: FitResult, images: Items, labeling: Labeling) -> PseudoLabeled:
        """Label images with the network of a training."""
        began, known = time.monotonic(), self.workdir.facts(step)
        if known is None:
            self._tell(step, f"labeling {len(images)} images")
        before = device_of(teacher.model)
        model = teacher.model.to(self.device)
        labeler = partial(
            PseudoLabeler,
            model if labeling.tta is None else labeling.tta(model),
            num_classes=self.num_classes,
            ignore_index=self.config.ignore_index,
            batch_size=self.config.eval_batch_size,
            num_workers=self.config.num_workers,
            precision=self.config.precision,
            progress=self.progress,
        )
        threshold = labeling.threshold
        if labeling.keep_per_class is not None:
            threshold = self._thresholds(step, labeler(), images, labeling.keep_per_class)
        folder = self.workdir.path(step, "masks")
        if folder is not None and (error := misplaced(folder / "labels.json")) is not None:
            raise error
        self.labeled[step] = labeler(threshold=threshold).label(images, MaskStore(folder, verify=self.verify))
        model.to(before)
        by = next((name for name, trained in self.trained.items() if trained is teacher), None)
        if by is not None:
            self.labeled_by[step] = by
        signs = self._signs_in_labels(step) if known is None else ()
        self._done(step, time.monotonic() - began, signs, labeled_by=by)
        done = f"labeled {len(images)} images in {format_duration(self.seconds[step])}"
        self._tell(step, done if known is None else f"{len(images)} images were labeled before; taken from {folder}")
        return self.labeled[step]

    def rank(self, step: str, teacher: FitResult, images: Items, ranker: Ranker | None = None) -> Ranking:
        """Rank images by their stability over the snapshots of a training, or with a custom ranker."""
        began = time.monotonic()
        path = self.workdir.path(step, "ranking.csv")
        owner = {
            "teacher": fingerprint(teacher.model),
            "snapshots": [fingerprint(snapshot) for snapshot in teacher.snapshots],
            "ranker": describe(ranker),
            "items": join_checksums(images.ids, []),
        }
        found = None if path is None else read_ranking(path, owner)
        if found is None:
            self._tell(step, f"ranking {len(images)} images")
        if found is not None:
            ranking = found
        elif ranker is not None:
            ranking = all_gather(ranker.rank(images))[0]
        else:
            stability = StabilityRanker(
                [copy_to_cpu(snapshot).to(self.device) for snapshot in teacher.snapshots],
                num_classes=self.num_classes,
                batch_size=self.config.eval_batch_size,
                num_workers=self.config.num_workers,
                precision=self.config.precision,
                progress=self.progress,
            )
            ranking = stability.rank(images, store=self.workdir.path(step, "scores"))
        self._kept += [(step, "ranking.csv"), (step, "ranking.json")]
        self.ranking = _check_ranking(ranking, images.ids, "the ranker" if found is None else str(path))
        if path is not None and found is None and rank() == 0:
            write_ranking(path, owner, self.ranking)
        self._done(step, time.monotonic() - began)
        done = f"ranked {len(images)} images in {format_duration(self.seconds[step])}"
        self._tell(step, done if found is None else f"{len(images)} images were ranked before; taken from {path}")
        return self.ranking

    def result(self, last: FitResult) -> SelfTrainingResult:
        """Collect the results and write the report."""
        result = SelfTrainingResult(
            model=last.model.to(self.device),
            stages=self.trained,
            labels=self.labeled,
            ranking=self.ranking,
            skipped=self.skipped,
            seconds=self.seconds,
            warnings=self.warnings,
            labeled_by=self.labeled_by,
            predictions=self._predictions(last),
        )
        if self.workdir.folder is not None and not self.workdir.is_finished:
            self.workdir.finish()
            if rank() == 0:
                write_report(result, self.workdir.folder, class_names=self.class_names)
                if not Charts().are_drawn:
                    LOG.warning('the report has no curves, which need matplotlib: pip install "stseg[report]"')
        self._check_files()
        barrier()
        return result

    def new_model(self, init: FitResult | None = None) -> nn.Module:
        """Make a network, bare or wrapped as ``make_model`` makes it, with the weights of ``init`` if given.

        Raises:
            ValueError: if the weights do not fit the network.
        """
        model = self.make_model()
        if init is not None:
            try:
                as_segmenter(model).load_state_dict(as_segmenter(init.model).state_dict())
            except RuntimeError as error:
                first = " ".join(line.strip() for line in str(error).splitlines()[:2])
                raise ValueError(
                    f"student_init is 'teacher', but its weights do not fit the network of make_model: {first[:200]}"
                ) from None
        return model

    def new_method(self, step: str, make_method: MakeMethod, init: FitResult | None = None) -> Method:
        """Make the method of a step on the device, with random weights that depend only on the seed and the step."""
        with self.initial_weights(step):
            method = make_method(lambda: self.new_model(init))
        if not isinstance(method, Method):
            raise TypeError(
                f"the method of step {step!r} is {type(method).__name__}; expected a stseg.Method, such as "
                "method=lambda make_model: stseg.methods.FixMatch(make_model())"
            )
        return place(method, self.device)

    @contextmanager
    def initial_weights(self, step: str) -> Iterator[None]:
        """Make random weights depend only on the seed and the step."""
        seed = derive_seed(self.config.seed, "init", step)
        with fixed_seed(seed), preserved_random_state(self.device):
            torch.manual_seed(seed)
            yield

    def streams(self, method: Method, labeled: Items, config: TrainConfig) -> Streams:
        """Return the labeled stream, and the unlabeled one if the method uses it.

        Raises:
            ValueError: if the method needs unlabeled images and there are none.
        """
        if method.uses_unlabeled and not self.unlabeled:
            raise ValueError(f"{type(method).__name__} learns from unlabeled images; expected fit(labeled, unlabeled)")
        streams = Streams(labeled, self.unlabeled if method.uses_unlabeled else None, config, view=view_of(method))
        streams.num_classes = self.num_classes
        return streams

    def _predictions(self, last: FitResult) -> Predictions | None:
        """Return pictures of predictions of the last training; what goes wrong there is told and does not end a run."""
        found = None
        if rank() == 0:
            try:
                found = self._pictures(last.model)
            except Exception as error:
                text = f"the report has no pictures of predictions: {type(error).__name__}: {error}"
                warn_of_run(text, show=self.progress)
        gathered: list[Predictions | None] = all_gather(found)
        return gathered[0]

    def _pictures(self, model: nn.Module) -> Predictions | None:
        """Return pictures of validation images or, without them, of unlabeled ones that have no pseudo-mask.

        Those in the folder are returned where there are any. Unlabeled images may be large, and are predicted by tiles.
        """
        folder, made, known = self.workdir.folder, "", None
        if folder is not None:
            made = fingerprint(model)
            with suppress(DamagedFileError):  # they are made again
                known = read_predictions(folder, made)
        items = self.val
        if items is None and not self.labeled:  # of which there are pictures
            items, model = self.unlabeled, Tiled(model)
        if known is not None or self.workdir.is_finished or not items:
            return known
        with preserved_random_state(self.device):
            found = predict_pictures(
                model, items, self.num_classes, self.config, with_mask=self.val is not None, progress=self.progress
            )
        if folder is not None:
            write_predictions(folder, found, made)
        return found

    def _check_files(self) -> None:
        """Raise a ``WorkdirMissingError`` if results are not on disk any more."""
        files: list[tuple[str, ...]] = [(step, "masks", "labels.json") for step in self.labeled]
        for step, found in self.trained.items():
            if step in self.seconds:
                files += [(step, "model.safetensors"), (step, "progress.json"), (step, "stage.json")]
                files += [(step, "snapshots")] if found.snapshots else []
        files += self._kept
        for path in (self.workdir.path(*names) for names in files):
            if path is not None and not path.exists():
                raise WorkdirMissingError(
                    f"{path} was removed or moved while the run was going on; start the run again to make it again"
                )

    def _thresholds(self, step: str, labeler: PseudoLabeler, images: Items, keep: float) -> float | tuple[float, ...]:
        """Return the thresholds of the classes, computed once and kept beside the masks."""
        path = self.workdir.path(step, "thresholds.json")
        if path is None:
            return labeler.class_thresholds(images, keep)
        self._kept.append((step, "thresholds.json"))
        owner = {"model": fingerprint(labeler.model), "keep_per_class": keep}
        record = claim(path, owner, delete=path, to="compute the thresholds again")
        if "result" not in record:
            record["result"] = labeler.class_thresholds(images, keep)
            if rank() == 0:
                write_record(path, record)
        try:
            return check_threshold([float(value) for value in record["result"]], self.num_classes)
        except (TypeError, ValueError):
            raise DataError(f"{path} is damaged; delete it to compute the thresholds again") from None

    def _done(self, step: str, seconds: float, warnings: Sequence[str] = (), **facts: Any) -> None:
        known = self.workdir.facts(step) or {}
        self.seconds[step] = known.get("seconds", seconds)
        if found := tuple(known.get("warnings", warnings)):
            self.warnings[step] = found
            facts["warnings"] = list(found)
        self.workdir.done(step, seconds=round(self.seconds[step], 3), **facts)

    def _signs_in_labels(self, step: str) -> list[str]:
        """Warn of pseudo-masks that lack classes, or hold nothing, and return the warnings."""
        signs: list[str] = []
        if rank() == 0 and self.labeled_classes is not None:
            predicted = count_classes(self.labeled[step].store, self.labeled[step].ids, self.labeled_classes)
            found = (vanished_classes(self.labeled_classes, predicted), nothing_kept(predicted))
            signs = [text for text in found if text is not None]
            for text in signs:
                warn_of_run(f"{step}: {text}", show=self.progress)
        gathered: list[list[str]] = all_gather(signs)
        return gathered[0]

    def _tell(self, step: str, text: str) -> None:
        if rank() == 0:
            LOG.info(f"{step}: {text}")


def _check_ranking(ranking: Ranking, ids: Sequence[str], source: str) -> Ranking:
    """Return a ranking with the ids of the images.

    Raises:
        DataError: if it is empty, an index is out of range or occurs twice, its ids are those of other images, or its
            scores are not finite and highest first.
    """
    if not len(ranking):
        raise DataError(f"{source} ranks no image")
    if len(set(ranking.indices)) < len(ranking) or not set(ranking.indices) <= set(range(len(ids))):
        raise DataError(
            f"{source} gives {len(ranking)} indices from {min(ranking.indices)} to {max(ranking.indices)}; "
            f"expected each of 0..{len(ids) - 1} at most once"
        )
    found = tuple(ids[index] for index in ranking.indices)
    if ranking.ids != tuple(map(str, ranking.indices)):  # numbers are no names
        for index, id, expected in zip(ranking.indices, ranking.ids, found, strict=True):
            if id != expected:
                raise DataError(
                    f"{source} calls image {index} {id!r}, but it is {expected!r} in the data set; expected the ids of "
                    "the data set that was ranked, or the numbers of the images as ids"
                )
    for score, lower in zip(ranking.scores, (*ranking.scores[1:], ranking.scores[-1]), strict=True):
        if not math.isfinite(score) or not score >= lower:
            raise DataError(f"{source} has the score {score} before {lower}; expected finite scores, the highest first")
    return replace(ranking, ids=found)
