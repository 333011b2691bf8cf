"""The steps of a self-training run: train, rank, label. Each is durable, each is done once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data import MixedDataset
from stseg.data.convert import image_of, pair_of
from stseg.data.items import ids_of
from stseg.distributed import all_gather, barrier, rank, setup_device
from stseg.engine.checkpoint import copy_on_cpu
from stseg.engine.config import TrainConfig
from stseg.engine.optimizers import parameter_groups
from stseg.errors import DataError
from stseg.functional.thresholds import check_threshold
from stseg.inference.labeler import PseudoLabeled, PseudoLabeler
from stseg.inference.mask_store import check_store_id
from stseg.inference.preflight import check_labeled, check_network, dataset_fingerprint, find_unreadable
from stseg.inference.rankers import StabilityRanker
from stseg.inference.ranking import Ranking
from stseg.inference.sweep import Skipped
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, fingerprint
from stseg.seeds import derive_seed, fixed_seed
from stseg.stages.report import write_report
from stseg.stages.result import SelfTrainingResult
from stseg.stages.workdir import Workdir
from stseg.storage.records import read_record, refuse_other, write_record
from stseg.training import FitResult, fit
from stseg.types import BatchAugmentation


class Ranker(Protocol):
    """What can take the place of :class:`stseg.StabilityRanker` in a run."""

    def rank(self, dataset: Dataset[Any]) -> Ranking:
        """Rank all images of a data set, best first."""
        ...


class Images(Dataset[Tensor]):
    """Some images of a data set under their ids, and nothing else: whatever stands behind them is not handed on."""

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], ids: Sequence[str]) -> None:
        self.dataset, self.indices, self.ids = dataset, list(indices), list(ids)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        return image_of(self.dataset[self.indices[position]], name=self.ids[position])


@dataclass(frozen=True)
class StageSettings:
    """What all steps of a run have in common."""

    make_model: Callable[[], nn.Module]
    num_classes: int
    config: TrainConfig
    strong: BatchAugmentation | None
    tta: Callable[[nn.Module], nn.Module] | None
    threshold: float | tuple[float, ...]
    keep_per_class: float | None
    student_init: Literal["fresh", "teacher"]
    keep: Literal["final", "best"]
    ranker: Ranker | None
    ignore_index: int
    inference_batch_size: int
    skip_unreadable: bool
    save_every: float
    progress: bool


class Stages:
    """Runs the steps; results stay in memory, and in the work directory if there is one."""

    def __init__(self, settings: StageSettings, workdir: Workdir, val: Dataset[Any] | None) -> None:
        self.settings, self.workdir, self.val = settings, workdir, val
        self.device = setup_device()
        self.trained: dict[str, FitResult] = {}
        self.labeled: dict[str, PseudoLabeled] = {}
        self.ranking: Ranking | None = None
        self.skipped: tuple[Skipped, ...] = ()
        self.seconds: dict[str, float] = {}

    def check(self, labeled: Dataset[Any], unlabeled: Dataset[Any] | None, teacher: FitResult | None) -> Images | None:
        """Look at all data and at the network; what is wrong is found before anything is trained.

        Args:
            labeled: items ``(image, mask)``.
            unlabeled: items are images; None stands for none.
            teacher: trained elsewhere, or None.

        Returns:
            The unlabeled images that can be read.
        """
        s = self.settings
        ids = [] if unlabeled is None else ids_of(unlabeled)
        for id in ids:
            check_store_id(id)
        facts = {} if teacher is None else {"teacher": fingerprint(teacher.model)}
        look = partial(
            check_labeled,
            num_classes=s.num_classes,
            ignore_index=s.ignore_index,
            num_workers=s.config.num_workers,
            progress=s.progress,
        )
        facts["labeled"] = look(labeled, name="labeled")
        image = pair_of(labeled[0], name=ids_of(labeled)[0])[0]
        if self.val is not None:
            facts["validation"] = look(self.val, name="validation", channels=len(image))
        facts["network"] = self._check_network(image, will_label=unlabeled is not None)
        if teacher is not None:
            check_network(teacher.model, image, s.num_classes)
            if s.student_init == "teacher":
                self.new_model("check", teacher)
            self.trained["teacher"] = teacher
        if unlabeled is None:
            self.workdir.claim(facts)
            return None
        facts["unlabeled"] = dataset_fingerprint(unlabeled)
        self.workdir.claim(facts)
        done = self.workdir.facts("check")
        if done is None or "skipped" not in done:
            skipped = find_unreadable(
                unlabeled,
                channels=len(image),
                skip=s.skip_unreadable,
                num_workers=s.config.num_workers,
                progress=s.progress,
            )
            done = {"skipped": [asdict(one) for one in skipped]}
            self.workdir.done("check", **done)
        self.skipped = tuple(Skipped(**one) for one in done["skipped"])
        left_out = {one.index for one in self.skipped}
        kept = [index for index in range(len(ids)) if index not in left_out]
        return Images(unlabeled, kept, [ids[index] for index in kept])

    def train(
        self, step: str, dataset: MixedDataset, snapshots: Sequence[int] = (), *, teacher: FitResult | None = None
    ) -> FitResult:
        """Train a network of its own, from fresh weights or its teacher's. None of those before stays on the device."""
        for earlier in self.trained.values():
            earlier.model.to("cpu")
        s = self.settings
        result = fit(
            self.new_model(step, teacher if s.student_init == "teacher" else None),
            dataset,
            s.config.with_seed(derive_seed(s.config.seed, step)),
            strong=s.strong if dataset.pseudo is not None else None,
            val=self.val,
            snapshots=snapshots,
            keep=s.keep,
            ignore_index=s.ignore_index,
            inference_batch_size=s.inference_batch_size,
            workdir=self.workdir.path(step),
            save_every=s.save_every,
            check=False,
            progress=s.progress,
            title=step,
        )
        self.trained[step] = result
        self._done(step, result.seconds)
        return result

    def label(self, step: str, teacher: FitResult, images: Dataset[Any]) -> PseudoLabeled:
        """Label images with the network of a stage."""
        s, began = self.settings, time.monotonic()
        before = device_of(teacher.model)
        model = teacher.model.to(self.device)
        labeler = partial(
            PseudoLabeler,
            model if s.tta is None else s.tta(model),
            num_classes=s.num_classes,
            ignore_index=s.ignore_index,
            batch_size=s.inference_batch_size,
            num_workers=s.config.num_workers,
            precision=s.config.precision,
            progress=s.progress,
        )
        threshold = self._thresholds(step, labeler(), images) if s.keep_per_class is not None else s.threshold
        self.labeled[step] = labeler(threshold=threshold).label(images, self.workdir.path(step, "masks"))
        model.to(before)
        self._done(step, time.monotonic() - began)
        return self.labeled[step]

    def rank(self, step: str, teacher: FitResult, images: Dataset[Any]) -> Ranking:
        """Rank images by the stability of their masks over the snapshots of a stage, or with the caller's ranker."""
        s, began = self.settings, time.monotonic()
        path = self.workdir.path(step, "ranking.csv")
        if path is not None and path.exists():
            self.ranking = Ranking.from_csv(path)
            facts = self.workdir.facts(step) or {}
            if len(self.ranking) != facts.get("images", len(self.ranking)):
                raise DataError(
                    f"{path} ranks {len(self.ranking)} images, not {facts['images']}; remove it to rank anew"
                )
        elif s.ranker is not None:
            self.ranking = all_gather(s.ranker.rank(images))[0]
        else:
            ranker = StabilityRanker(
                [copy_on_cpu(snapshot).to(self.device) for snapshot in teacher.snapshots],
                num_classes=s.num_classes,
                batch_size=s.inference_batch_size,
                num_workers=s.config.num_workers,
                precision=s.config.precision,
                progress=s.progress,
            )
            self.ranking = ranker.rank(images, resume=self.workdir.path(step, "scores"))
        self.ranking = _checked(self.ranking, ids_of(images), str(path or "the ranker"))
        if path is not None and rank() == 0 and not path.exists():
            self.ranking.to_csv(path)
        self._done(step, time.monotonic() - began, images=len(self.ranking))
        return self.ranking

    def result(self, last: FitResult) -> SelfTrainingResult:
        """Everything together, and the report on it."""
        result = SelfTrainingResult(
            model=last.model.to(self.device),
            stages=self.trained,
            labels=self.labeled,
            ranking=self.ranking,
            skipped=self.skipped,
            seconds=self.seconds,
        )
        if self.workdir.folder is not None and rank() == 0:
            write_report(result, self.workdir.folder)
        barrier()
        return result

    def new_model(self, step: str, teacher: FitResult | None = None) -> nn.Module:
        """A network with the initial weights of a step: its own, or those of its teacher.

        Raises:
            ValueError: if the teacher is another kind of network.
        """
        seed = derive_seed(self.settings.config.seed, "init", step)
        with fixed_seed(seed), torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = as_segmenter(self.settings.make_model()).to(self.device)
        if teacher is not None:
            try:
                model.load_state_dict(as_segmenter(teacher.model).state_dict())
            except RuntimeError as error:
                first = "; ".join(line.strip() for line in str(error).splitlines()[:2])
                raise ValueError(
                    f"student_init is 'teacher', but its weights do not fit the network of make_model: {first[:200]}"
                ) from None
        return model

    def _thresholds(self, step: str, labeler: PseudoLabeler, images: Dataset[Any]) -> float | tuple[float, ...]:
        """One for each class, found once and kept beside the masks."""
        keep = self.settings.keep_per_class
        assert keep is not None
        path = self.workdir.path(step, "thresholds.json")
        source = {"model": fingerprint(labeler.model), "keep_per_class": keep}
        found = None if path is None else read_record(path)
        if path is not None and found is not None:
            values = found.pop("thresholds", None)
            refuse_other(found, source, path)
            try:
                return check_threshold([float(value) for value in values], self.settings.num_classes)
            except (TypeError, ValueError):
                raise DataError(f"{path} is damaged; remove it to find the thresholds anew") from None
        thresholds = labeler.class_thresholds(images, keep)
        if path is not None and rank() == 0:
            write_record(path, {**source, "thresholds": thresholds})
        return thresholds

    def _check_network(self, image: Tensor, *, will_label: bool) -> str:
        model, another = self.new_model("check"), self.new_model("check")
        known = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in known for parameter in another.parameters()):
            raise ValueError(
                "make_model returned the same parameters twice; expected a fresh network each time it is called"
            )
        check_network(model, image, self.settings.num_classes)
        parameter_groups(model, self.settings.config)  # which finds the backbone
        if will_label and self.settings.tta is not None:  # which shows it other sizes
            check_network(self.settings.tta(model), image, self.settings.num_classes)
        # The seed makes its first weights the same in every run, so pretrained ones count.
        return f"{fingerprint(model)}, {sum(p.requires_grad for p in model.parameters())} trained tensors"

    def _done(self, step: str, seconds: float, **more: int) -> None:
        facts = self.workdir.facts(step) or {}
        self.seconds[step] = facts.get("seconds", seconds)
        self.workdir.done(step, seconds=round(self.seconds[step], 3), **more)


def _checked(ranking: Ranking, ids: Sequence[str], source: str) -> Ranking:
    """A ranking from outside, under the ids of the images.

    Raises:
        DataError: if it is empty, or names images that are not there, or one twice.
    """
    if not len(ranking):
        raise DataError(f"{source} ranks no image")
    if len(set(ranking.indices)) < len(ranking) or not set(ranking.indices) <= set(range(len(ids))):
        raise DataError(
            f"{source} gives {len(ranking)} indices from {min(ranking.indices)} to {max(ranking.indices)}; "
            f"expected each of 0..{len(ids) - 1} at most once"
        )
    return replace(ranking, ids=tuple(ids[index] for index in ranking.indices))
