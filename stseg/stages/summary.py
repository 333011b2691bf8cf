"""What a report tells of a run: read from its result, or from its work directory, finished or under way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from stseg.data.items import Items
from stseg.engine.checkpoint import Row, read_progress
from stseg.errors import DataError
from stseg.inference.class_counts import ClassCounts
from stseg.inference.fingerprints import item_count
from stseg.inference.labeler import PseudoLabeled
from stseg.inference.mask_store import MaskStore
from stseg.inference.ranking import Ranking, reliable_count
from stseg.inference.reading import Skipped
from stseg.models.summary import summarize_network
from stseg.stages.predictions import Predictions, read_predictions
from stseg.stages.ranking_file import read_any_ranking
from stseg.stages.result import SelfTrainingResult
from stseg.storage.files import absolute_folder
from stseg.storage.records import read_record

MOST_COUNTED = 2000  # pseudo-masks whose pixels are counted
SINGLE = "training"  # name of the training of a folder of stseg.fit


@dataclass(frozen=True)
class TrainingSummary:
    """One training.

    Attributes:
        history: its rows so far.
        method: its method and settings; empty if not known.
        network: its network, from :func:`stseg.models.summary.summarize_network`; empty if not known.
        warnings: what it warned of.
    """

    history: Sequence[Row]
    method: Mapping[str, Any]
    network: Mapping[str, Any]
    warnings: Sequence[str]

    def row(self, keep: str) -> Row | None:
        """Return the row of the weights that were kept: the one with the best mIoU, or the last; None before it."""
        if keep == "best":
            measured = [row for row in self.history if not math.isnan(row.get("miou", math.nan))]
            if measured:
                return max(measured, key=lambda row: row["miou"])
        return self.history[-1] if self.history else None


@dataclass(frozen=True)
class LabelingSummary:
    """Pseudo-masks of one labeling.

    Attributes:
        by: name of the training whose network made them; None if not known.
        store: the masks.
        ids: their names.
        data: images and masks; None if the images are not at hand.
    """

    by: str | None
    store: MaskStore
    ids: Sequence[str]
    data: PseudoLabeled | None


@dataclass(frozen=True)
class RunSummary:
    """A run, as its report tells of it.

    Attributes:
        folder: where the report of the run goes, and its ranking is looked for.
        settings: settings of the run; empty if not known.
        data: descriptions of the data sets; empty if not known.
        versions: versions of packages; empty if not known.
        trainings: the trainings by name, in order.
        labelings: the labelings by name, in order.
        ranking: how the unlabeled images were ranked.
        ranking_file: its file.
        reliable: number of reliable images, the first of the ranking.
        skipped: images that were left out.
        seconds: duration of each step so far.
        finished: when the run ended, in ISO format; None if it is not known, or the run is under way.
        is_finished: whether it has ended.
        class_names: names of the classes; None if not known.
        warnings: what the run warned of, beyond its trainings.
        predictions: pictures of predictions of the final network; None if there are none.
    """

    folder: Path
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, Any]
    trainings: Mapping[str, TrainingSummary]
    labelings: Mapping[str, LabelingSummary]
    ranking: Ranking | None
    ranking_file: Path | None
    reliable: int | None
    skipped: Sequence[Skipped]
    seconds: Mapping[str, float]
    finished: str | None
    is_finished: bool
    class_names: tuple[str, ...] | None
    warnings: Sequence[str]
    predictions: Predictions | None = None

    @property
    def keep(self) -> str:
        """Which weights each training returns."""
        return str(self.settings.get("keep", "final"))

    @property
    def last(self) -> TrainingSummary | None:
        """The last training; None before the first one."""
        return list(self.trainings.values())[-1] if self.trainings else None

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if not known."""
        return self._labeler("num_classes") or (len(counts["pixels"]) if (counts := self.classes("labeled")) else None)

    @property
    def ignore_index(self) -> int:
        """Mask value of pixels that are left out."""
        known = self._labeler("ignore_index")
        return self.settings.get("config", {}).get("ignore_index", 255) if known is None else known

    def classes(self, name: str) -> Mapping[str, Any] | None:
        """Return the pixels of each class of the labeled or the validation data; None if not known."""
        return self.data.get(f"{name} classes")

    def count(self, name: str) -> int | None:
        """Return the number of labeled, unlabeled or validation images; None if there are none, or it is not known."""
        return item_count(self.data[name]) if name in self.data else None

    def class_name(self, index: int) -> str:
        """Return the name of a class, or its number."""
        return str(index) if self.class_names is None else self.class_names[index]

    def count_classes(self, name: str) -> ClassCounts | None:
        """Count the pixels of each class in evenly spaced masks of a labeling; None if there is none."""
        labeling, num_classes = self.labelings[name], self.num_classes
        if num_classes is None or not labeling.ids:
            return None
        step = -(-len(labeling.ids) * len(self.labelings) // MOST_COUNTED)
        counts = ClassCounts(num_classes, self.ignore_index, name)
        for id in labeling.ids[::step]:
            counts.add(labeling.store[id])
        return counts

    def _labeler(self, name: str) -> int | None:
        found = (labeling.store.labeler for labeling in self.labelings.values())
        return next((labeler[name] for labeler in found if labeler is not None), None)


def summarize_result(result: SelfTrainingResult, folder: Path) -> RunSummary:
    """Tell of a run from its result, and from the record in its work directory if ``folder`` is that.

    Raises:
        DamagedFileError: if the record is damaged.
    """
    run = read_record(folder / "run.json") or {}
    trainings = {
        name: TrainingSummary(
            stage.history,
            (read_record(folder / name / "stage.json") or {}).get("method", {}) if run else {},
            summarize_network(stage.model),
            stage.warnings,
        )
        for name, stage in result.stages.items()
    }
    labelings = {
        name: LabelingSummary(result.labeled_by.get(name), data.store, data.ids, data)
        for name, data in result.labels.items()
    }
    ranking_file = next(iter(_ranking_files(folder, result.seconds)), None) if run else None
    return RunSummary(
        folder=folder,
        settings=run.get("settings", {}),
        data=run.get("data", {}),
        versions=run.get("versions", {}),
        trainings=trainings,
        labelings=labelings,
        ranking=result.ranking,
        ranking_file=ranking_file,
        reliable=_reliable(result.ranking, run.get("settings", {})),
        skipped=result.skipped,
        seconds=result.seconds,
        finished=run.get("finished"),
        is_finished=True,
        class_names=tuple(run["class names"]) if "class names" in run else None,
        warnings=[text for texts in result.warnings.values() for text in texts],
        predictions=result.predictions,
    )


def read_run(workdir: str | Path, images: Dataset[Any] | None = None) -> RunSummary:
    """Tell of a run from its work directory alone, of :class:`stseg.SelfTrainer` or :func:`stseg.fit`.

    Args:
        workdir: the folder; the run may be under way.
        images: the unlabeled images, to go with the pseudo-masks.

    Raises:
        DataError: if the folder is no work directory, or pseudo-masks have no image in ``images``.
        DamagedFileError: if a file in it is damaged.
    """
    folder = absolute_folder(workdir)
    assert folder is not None
    run = read_record(folder / "run.json")
    if run is None:
        return _read_training(folder)
    steps = {name: facts for name, facts in run["steps"].items() if name != "check"}
    begun = sorted(path.parent.name for path in folder.glob("*/stage.json"))
    trained = [name for name in [*steps, *begun] if name in begun]
    labeled = [path.parent.parent.name for path in sorted(folder.glob("*/masks/labels.json"))]
    ranking_file = next(iter(_ranking_files(folder, steps)), None)
    ranking = None if ranking_file is None else read_any_ranking(ranking_file)
    progress = {name: read_progress(folder / name) for name in dict.fromkeys(trained)}
    items = None if images is None else Items.of(images)
    return RunSummary(
        folder=folder,
        settings=run["settings"],
        data=run["data"],
        versions=run["versions"],
        trainings={
            name: TrainingSummary(
                state.history,
                (read_record(folder / name / "stage.json") or {}).get("method", {}),
                steps.get(name, {}).get("network", {}),
                tuple(state.warnings.values()),
            )
            for name, state in progress.items()
        },
        labelings={
            name: _read_labeling(folder / name / "masks", steps.get(name, {}).get("labeled_by"), items)
            for name in dict.fromkeys([name for name in [*steps, *labeled] if name in labeled])
        },
        ranking=ranking,
        ranking_file=ranking_file,
        reliable=_reliable(ranking, run["settings"]),
        skipped=[Skipped(**one) for one in run["steps"].get("check", {}).get("skipped", ())],
        seconds={name: facts["seconds"] for name, facts in steps.items()}
        | {name: state.seconds for name, state in progress.items() if name not in steps},
        finished=run.get("finished"),
        is_finished="finished" in run or (folder / "report.html").exists(),
        class_names=tuple(run["class names"]) if "class names" in run else None,
        warnings=[text for facts in steps.values() for text in facts.get("warnings", ())],
        predictions=read_predictions(folder),
    )


def _read_training(folder: Path) -> RunSummary:
    """Tell of a training of :func:`stseg.fit`."""
    stage = read_record(folder / "stage.json")
    if stage is None:
        what = (
            "is not a work directory: it has neither run.json nor stage.json" if folder.exists() else "does not exist"
        )
        within = sorted({path.parent.name for name in ("run", "stage") for path in folder.glob(f"*/{name}.json")})
        hint = f"; expected one of the runs in it: {', '.join(map(repr, within[:8]))}" if within else ""
        raise DataError(f"{folder} {what}{hint}")
    state = read_progress(folder)
    return RunSummary(
        folder=folder,
        settings={name: stage[name] for name in ("method", "config", "keep")},
        data=stage["data"],
        versions={},
        trainings={SINGLE: TrainingSummary(state.history, stage["method"], {}, tuple(state.warnings.values()))},
        labelings={},
        ranking=None,
        ranking_file=None,
        reliable=None,
        skipped=(),
        seconds={SINGLE: state.seconds},
        finished=None,
        is_finished=(folder / "model.safetensors").exists(),
        class_names=None,
        warnings=(),
    )


def _read_labeling(folder: Path, by: str | None, images: Items | None) -> LabelingSummary:
    store = MaskStore(folder)
    ids = sorted(store)
    if images is None:
        return LabelingSummary(by, store, ids, None)
    places = {id: index for index, id in enumerate(images.ids)}
    for id in ids:
        if id not in places:
            raise DataError(f"the images have no item {id!r}, whose mask is in {folder}; expected those of the run")
    return LabelingSummary(by, store, ids, PseudoLabeled(images, store, indices=[places[id] for id in ids], ids=ids))


def _ranking_files(folder: Path, steps: Mapping[str, Any]) -> list[Path]:
    paths = (folder / name / "ranking.csv" for name in steps)
    return [path for path in paths if path.exists()]


def _reliable(ranking: Ranking | None, settings: Mapping[str, Any]) -> int | None:
    fraction = settings.get("method", {}).get("reliable_fraction")
    return None if ranking is None or fraction is None else reliable_count(len(ranking), fraction)
