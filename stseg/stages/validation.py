"""Validation of a run before training starts: data, network, and one step of each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from stseg.data.items import Items
from stseg.distributed import rank
from stseg.engine.trial import try_step
from stseg.inference.fingerprints import dataset_fingerprint
from stseg.inference.preflight import check_labeled, check_network, find_unreadable
from stseg.inference.reading import Skipped
from stseg.inference.store_ids import check_store_ids
from stseg.models.segmenter import as_segmenter
from stseg.models.state import fingerprint
from stseg.progress import warn_of_run
from stseg.stages.labeling import Labeling
from stseg.stages.stages import MakeMethod, Stages


def validate_run(
    stages: Stages,
    labeled: Items,
    unlabeled: Items | None,
    later_methods: Mapping[str, MakeMethod],
    labeling: Labeling | None,
    *,
    skip_unreadable: bool = False,
) -> Items | None:
    """Validate all data, the network and one step of each method.

    Args:
        stages: the run; its work directory records the data.
        labeled: labeled items.
        unlabeled: images; None for none.
        later_methods: the methods of the trainings after the first one, by step.
        labeling: how pseudo-labels are made, if they are.
        skip_unreadable: whether to leave out unlabeled images that cannot be read.

    Returns:
        The unlabeled images that can be read.
    """
    if unlabeled is not None and labeling is not None:
        check_store_ids(unlabeled.ids, stages.workdir.path("unreliable", "masks"))
    check = partial(
        check_labeled,
        num_classes=stages.num_classes,
        ignore_index=stages.config.ignore_index,
        num_workers=stages.config.num_workers,
        progress=stages.progress,
    )
    teacher = stages.trained.get("teacher")
    facts: dict[str, Any] = {} if teacher is None else {"teacher": fingerprint(teacher.model)}
    facts["labeled"], counts = check(labeled, name="labeled")
    facts["labeled classes"] = counts.provenance()
    stages.labeled_classes = counts
    image = labeled.image(0)
    if stages.val is not None:
        facts["validation"], counts = check(stages.val, name="validation", channels=len(image))
        facts["validation classes"] = counts.provenance()
    facts["network"] = _check_network(stages, image, labeling)
    if teacher is not None:
        check_network(teacher.model, image, stages.num_classes)
    if unlabeled is not None:
        facts["unlabeled"] = dataset_fingerprint(unlabeled)
    stages.workdir.claim(facts)
    done = stages.workdir.facts("check")
    if done is not None:
        stages.skipped = tuple(Skipped(**one) for one in done["skipped"])
    elif unlabeled is not None:
        stages.skipped = tuple(
            find_unreadable(
                unlabeled,
                channels=len(image),
                skip=skip_unreadable,
                num_workers=stages.config.num_workers,
                progress=stages.progress,
            )
        )
        if stages.skipped and rank() == 0:
            first, count = stages.skipped[0], len(stages.skipped)
            images = f"{count} unlabeled images" if count > 1 else "an unlabeled image"
            warn_of_run(
                f"left out {images} that cannot be read, first {first.id!r}: {first.reason}", show=stages.progress
            )
    if unlabeled is not None:
        left_out = {one.index for one in stages.skipped}
        readable = [index for index in range(len(unlabeled)) if index not in left_out]
        stages.unlabeled = unlabeled.subset(readable, only_images=True)
    if done is None:
        _try_methods(stages, later_methods, labeled)
        stages.workdir.done("check", skipped=[asdict(one) for one in stages.skipped])
    return stages.unlabeled


def _try_methods(stages: Stages, methods: Mapping[str, MakeMethod], labeled: Items) -> None:
    """Try a step of each method, with the labeled images in place of pseudo-labeled ones."""
    for step, make_method in methods.items():
        method = stages.new_method(step, make_method)
        streams = stages.streams(method, Items.of(_AsPseudo(labeled)), stages.config)
        try_step(method, streams, stages.config, metrics=stages.metrics or ())


def _check_network(stages: Stages, image: Tensor, labeling: Labeling | None) -> str:
    with stages.initial_weights("check"):
        model, another = (as_segmenter(stages.new_model()).to(device) for device in (stages.device, "cpu"))
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in known for parameter in another.parameters()):
        raise ValueError(
            "make_model returned the same parameters twice; expected a fresh network each time it is called"
        )
    check_network(model, image, stages.num_classes)
    if labeling is not None and labeling.tta is not None:  # which uses other sizes
        check_network(labeling.tta(model), image, stages.num_classes)
    # The seed fixes random weights, so the fingerprint differs only for other pretrained ones.
    return f"{fingerprint(model)}, {sum(p.requires_grad for p in model.parameters())} trained tensors"


class _AsPseudo(Dataset[Any]):
    """Annotated items marked as pseudo-labeled."""

    def __init__(self, labeled: Items) -> None:
        self.labeled, self.item_names = labeled, labeled.names

    def __len__(self) -> int:
        return len(self.labeled)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        return (*self.labeled.pair(index), True)
