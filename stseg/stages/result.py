"""What a self-training run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from stseg.engine.loop import FitResult
from stseg.inference.labeler import PseudoLabeled
from stseg.inference.ranking import Ranking
from stseg.inference.reading import Skipped


@dataclass(frozen=True)
class SelfTrainingResult:
    """What a run leaves behind.

    Attributes:
        model: the final network, wrapped, in evaluation mode.
        stages: the result of each training stage by name, in order: "teacher", then "student" (ST) or "student-1" and
            "student-2" (ST++). Their models, but for the last, are on the CPU.
        labels: the pseudo-labeled data sets by name: "labels" (ST), "reliable" and "unreliable" (ST++).
        ranking: how the unlabeled images were ranked (ST++).
        skipped: unlabeled images that could not be read and were left out.
        seconds: duration of each step by name, in order; of a labeling or ranking that was taken up
            again, of its last part.
    """

    model: nn.Module = field(repr=False)
    stages: dict[str, FitResult]
    labels: dict[str, PseudoLabeled]
    ranking: Ranking | None
    skipped: tuple[Skipped, ...]
    seconds: dict[str, float]
