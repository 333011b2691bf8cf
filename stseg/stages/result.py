"""Result of a self-training run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from stseg.engine.loop import FitResult
from stseg.inference.labeler import PseudoLabeled
from stseg.inference.ranking import Ranking
from stseg.inference.reading import Skipped
from stseg.stages.predictions import Predictions


@dataclass(frozen=True)
class SelfTrainingResult:
    """Result of a self-training run.

    Attributes:
        model: the final network, wrapped, in evaluation mode.
        stages: the result of each training stage by name, in order: "teacher", then "student" (ST) or "student-1" and
            "student-2" (ST++). All models but the last are on the CPU.
        labels: the pseudo-labeled data sets by name: "labels" (ST), "reliable" and "unreliable" (ST++).
        ranking: how the unlabeled images were ranked (ST++).
        skipped: unlabeled images that could not be read and were left out.
        seconds: duration of each step by name, in order; for a resumed labeling or ranking, only of the
            last part.
        warnings: early signs of a collapse by step, if there are any: what was seen, what it usually means, what to
            try.
        labeled_by: the training whose network made each of ``labels``, by name.
        predictions: pictures of predictions of the final network for the report; None if there are none.
    """

    model: nn.Module = field(repr=False)
    stages: dict[str, FitResult]
    labels: dict[str, PseudoLabeled]
    ranking: Ranking | None
    skipped: tuple[Skipped, ...]
    seconds: dict[str, float]
    warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labeled_by: dict[str, str] = field(default_factory=dict)
    predictions: Predictions | None = field(default=None, repr=False)
