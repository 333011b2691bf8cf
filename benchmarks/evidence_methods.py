"""Methods that ``evidence.py`` compares, as functions of the data and settings of a fraction and a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence_data import Renamed
from torch import nn
from torch.utils.data import Dataset

import stseg
from stseg.data import MixedDataset
from stseg.methods import (
    CPS,
    ST,
    AdvSSL,
    Baseline,
    FixMatch,
    Labeling,
    MeanTeacher,
    Recipe,
    STPlusPlus,
    Supervised,
    UniMatch,
)

MakeModel = Callable[[], nn.Module]
NOTHING: dict[str, Any] = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "cutout": None}


@dataclass(frozen=True)
class Case:
    """Data and settings of one run."""

    labeled: Dataset[Any]
    unlabeled: Dataset[Any]
    true: Dataset[Any]
    """The unlabeled images with their true masks, for measurements and references only."""
    everything: Dataset[Any]
    val: Dataset[Any]
    num_classes: int
    make_model: MakeModel
    config: stseg.TrainConfig
    folder: Path

    def trainer(
        self, name: str, method: Recipe | Callable[[MakeModel], stseg.Method], config: stseg.TrainConfig | None = None
    ) -> stseg.SelfTrainer:
        """Make the trainer of a run in its own folder."""
        return stseg.SelfTrainer(
            self.make_model,
            num_classes=self.num_classes,
            config=config or self.config,
            method=method,
            workdir=self.folder / name,
        )


Run = stseg.SelfTrainingResult
Method = Callable[[Case, str], Run]
"""``(case, name of the folder) -> result``."""


def longer(config: stseg.TrainConfig, times: int) -> stseg.TrainConfig:
    """Return the settings with ``times`` as many steps."""
    return replace(config, steps=times * (config.steps or 0))


def supervised(case: Case, name: str, *, times: int = 1) -> Run:
    """Train on the labeled images, for ``times`` as many steps."""
    trainer = case.trainer(name, Baseline(), longer(case.config, times))
    return trainer.fit(case.labeled, val=case.val)


def ceiling(case: Case, name: str) -> Run:
    """Train on the masks of all images."""
    return case.trainer(name, Baseline()).fit(case.everything, val=case.val)


def self_trained(case: Case, name: str, *, recipe: Recipe, times: int = 1, rate: float = 1.0) -> Run:
    """Run ST or ST++ from the supervised network, which is trained first if necessary.

    The students train for ``times`` as many steps at ``rate`` times the learning rate.
    """
    teacher = supervised(case, "supervised").stages["teacher"]
    config = longer(replace(case.config, lr=rate * case.config.lr), times)
    trainer = case.trainer(name, recipe, config)
    return trainer.fit(case.labeled, case.unlabeled, case.val, teacher=teacher)


def in_one_stage(case: Case, name: str, *, make: Callable[[MakeModel, int], stseg.Method]) -> Run:
    """Train a method on labeled and unlabeled images at once, for as many steps as the supervised network."""

    def make_method(make_model: MakeModel) -> stseg.Method:
        return make(make_model, case.num_classes)

    return case.trainer(name, make_method).fit(case.labeled, case.unlabeled, case.val)


def on_true_masks(case: Case, name: str, *, strong: Dataset[Any]) -> Run:
    """Train a student on true masks; about half the samples come from ``strong``, strongly augmented."""
    torch.manual_seed(case.config.seed)
    stage = stseg.fit(
        Supervised(case.make_model(), strong=stseg.StrongAugment()),
        MixedDataset(case.labeled, strong),
        case.config,
        val=case.val,
        workdir=case.folder / name / "teacher",
    )
    return Run(
        model=stage.model,
        stages={"teacher": stage},
        labels={},
        ranking=None,
        skipped=(),
        seconds={"teacher": stage.seconds},
    )


def strongly_augmented(case: Case, name: str) -> Run:
    """Train with strong augmentation alone: labeled images take the place of pseudo-labeled ones."""
    return on_true_masks(case, name, strong=Renamed(case.labeled, "{} again"))


def rightly_labeled(case: Case, name: str) -> Run:
    """Train as ST would with correct pseudo-labels."""
    return on_true_masks(case, name, strong=case.true)


def only(**chosen: Any) -> stseg.StrongAugment:
    """Make a strong augmentation with only the chosen operations."""
    return stseg.StrongAugment(**{**NOTHING, **chosen})


METHODS: dict[str, tuple[str, Method]] = {
    "supervised": ("supervised", supervised),
    "supervised-2x": ("supervised, twice the steps", partial(supervised, times=2)),
    "supervised-strong": ("supervised, strong augmentation too", strongly_augmented),
    "st": ("ST", partial(self_trained, recipe=ST())),
    "st++": ("ST++", partial(self_trained, recipe=STPlusPlus())),
    "st-true": ("ST, were all pseudo-labels right", rightly_labeled),
    "st-plain": ("ST without strong augmentation", partial(self_trained, recipe=ST(strong=None))),
    "st-jitter": ("ST, color jitter alone", partial(self_trained, recipe=ST(strong=only(jitter_p=0.8)))),
    "st-gray": ("ST, gray alone", partial(self_trained, recipe=ST(strong=only(gray_p=0.2)))),
    "st-blur": ("ST, blur alone", partial(self_trained, recipe=ST(strong=only(blur_p=0.5)))),
    "st-cutout": ("ST, cutout alone", partial(self_trained, recipe=ST(strong=only(cutout=stseg.Cutout())))),
    "st-2x": ("ST, student twice the steps", partial(self_trained, recipe=ST(), times=2)),
    "st-warm": ("ST, student starts as its teacher", partial(self_trained, recipe=ST(student_init="teacher"))),
    "st-balanced": (
        "ST, surest 80 % of each class",
        partial(self_trained, recipe=ST(labeling=Labeling(keep_per_class=0.8))),
    ),
    "st-both": ("ST, `from_scratch()`", partial(self_trained, recipe=ST.from_scratch())),
    "st++-both": ("ST++, `from_scratch()`", partial(self_trained, recipe=STPlusPlus.from_scratch())),
    "st-gentle": (
        "ST, `from_scratch()`, a quarter of the learning rate",
        partial(self_trained, recipe=ST.from_scratch(), rate=0.25),
    ),
    "fixmatch": ("FixMatch", partial(in_one_stage, make=lambda model, classes: FixMatch(model()))),
    "mean-teacher": ("Mean Teacher", partial(in_one_stage, make=lambda model, classes: MeanTeacher(model()))),
    "unimatch": ("UniMatch", partial(in_one_stage, make=lambda model, classes: UniMatch(model()))),
    "cps": ("CPS", partial(in_one_stage, make=lambda model, classes: CPS(model(), model()))),
    "adv-ssl": ("AdvSSL", partial(in_one_stage, make=lambda model, classes: AdvSSL(model(), num_classes=classes))),
    "ceiling": ("supervised, all masks", ceiling),
}
"""By name: the title in tables, and the function that runs it."""
