"""Methods that ``evidence.py`` compares, as functions of the data and settings of a fraction and a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence_data import Renamed
from torch import nn
from torch.utils.data import Dataset

import stseg
from stseg import methods
from stseg.augment import BoxMix, CropPair
from stseg.data import MixedDataset
from stseg.methods import ST, Baseline, Labeling, Recipe, STPlusPlus, Supervised

MakeModel = Callable[..., nn.Module]
"""Makes a network of the case; ``in_channels=`` and ``classes=`` make one of other channels."""
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


MakeMethod = Callable[[Case], stseg.Method]


def in_one_stage(case: Case, name: str, *, make: MakeMethod, times: int = 1) -> Run:
    """Train a method on labeled and unlabeled images at once, for as many steps as the supervised network."""
    trainer = case.trainer(name, lambda make_model: make(case), longer(case.config, times))
    return trainer.fit(case.labeled, case.unlabeled, case.val)


def ranked_by_views(case: Case, name: str) -> Run:
    """Run ST++ with images ranked by the agreement of one scale with the ten views, classes weighted by their area."""
    teacher = supervised(case, "supervised").stages["teacher"]
    ranker = stseg.StabilityRanker(
        [teacher.model, stseg.MultiScaleFlip(teacher.model)],
        num_classes=case.num_classes,
        score=stseg.functional.weighted_stability,
    )
    return self_trained(case, name, recipe=STPlusPlus(ranker=ranker))


def encoder_channels(network: nn.Module) -> int:
    """Return the channels of the deepest features of a network of segmentation_models_pytorch."""
    channels: Sequence[int] = _bare(network).encoder.out_channels
    return channels[-1]


def decoder_channels(network: nn.Module) -> int:
    """Return the channels of the features before its head."""
    return next(module.in_channels for module in _bare(network).segmentation_head if isinstance(module, nn.Conv2d))


def _bare(network: nn.Module) -> Any:
    return network.network if isinstance(network, stseg.Segmenter) else network


def make_cct(case: Case) -> stseg.Method:
    """Make CCT with decoders on the deepest features."""
    network = case.make_model()
    return methods.CCT(
        network, num_classes=case.num_classes, channels=encoder_channels(network), upsampling=_stride(network)
    )


def _stride(network: nn.Module) -> int:
    """Return the stride of the deepest features."""
    return int(_bare(network).encoder.output_stride)


def make_u2pl(case: Case) -> stseg.Method:
    """Make U2PL with contrast of the decoder's features."""
    network = case.make_model()
    return methods.U2PL(network, num_classes=case.num_classes, channels=decoder_channels(network), width=64)


def make_dcc(case: Case) -> stseg.Method:
    """Make DCC with pairs of crops of the size of all crops."""
    network, weak = case.make_model(), case.config.weak
    assert isinstance(weak, stseg.WeakAugment)
    assert isinstance(weak.crop_size, tuple)
    pairs = CropPair(weak.crop_size, base_size=weak.base_size, scale=weak.scale)
    return methods.DCC(network, channels=decoder_channels(network), pairs=pairs)


def make_ecs(case: Case) -> stseg.Method:
    """Make ECS with a corrector of the network's architecture."""
    corrector = case.make_model(in_channels=3 + case.num_classes, classes=case.num_classes + 1)
    return methods.ECS(case.make_model(), _bare(corrector))


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


ONE_STAGE: dict[str, tuple[str, MakeMethod]] = {
    "fixmatch": ("FixMatch", lambda case: methods.FixMatch(case.make_model())),
    "unimatch": ("UniMatch", lambda case: methods.UniMatch(case.make_model())),
    "unimatch-v2": ("UniMatch V2", lambda case: methods.UniMatchV2(case.make_model())),
    "mean-teacher": ("Mean Teacher", lambda case: methods.MeanTeacher(case.make_model())),
    "cutmix-seg": ("CutMix-Seg", lambda case: methods.CutMixSeg(case.make_model())),
    "class-mix": ("ClassMix", lambda case: methods.ClassMix(case.make_model())),
    "cps": ("CPS", lambda case: methods.CPS(case.make_model(), case.make_model())),
    "cps-cutmix": (
        "CPS with CutMix",
        lambda case: methods.CPS(case.make_model(), case.make_model(), mix=BoxMix(area=(0.25, 0.5), boxes=3)),
    ),
    "gct": ("GCT", lambda case: methods.GCT(case.make_model(), case.make_model(), num_classes=case.num_classes)),
    "cct": ("CCT", make_cct),
    "u2pl": ("U2PL", make_u2pl),
    "dcc": ("DCC", make_dcc),
    "adv-ssl": ("AdvSSL", lambda case: methods.AdvSSL(case.make_model(), num_classes=case.num_classes)),
    "s4gan": ("S4GAN", lambda case: methods.S4GAN(case.make_model(), num_classes=case.num_classes)),
    "ecs": ("ECS", make_ecs),
    "s4l": ("S4L", lambda case: methods.S4L(case.make_model(), num_classes=case.num_classes)),
}
"""Methods of one stage with their defaults, by name: the title in tables, and what makes the method."""

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
    "st++-views": ("ST++, ranked by one scale against the views", ranked_by_views),
    "supervised-4x": ("supervised, four times the steps", partial(supervised, times=4)),
    **{name: (title, partial(in_one_stage, make=make)) for name, (title, make) in ONE_STAGE.items()},
    "ceiling": ("supervised, all masks", ceiling),
}
"""By name: the title in tables, and the function that runs it."""

FROM_SUPERVISED = frozenset(name for name in METHODS if name.startswith("st") and name != "st-true")
"""Methods that start from the run ``"supervised"``."""
