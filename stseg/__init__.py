"""Semi-supervised segmentation in PyTorch: ST and ST++ for any network, from primitives to the whole loop."""

from stseg import data, functional, models
from stseg.augment import Cutout, StrongAugment, WeakAugment
from stseg.config import TrainConfig
from stseg.errors import (
    DataError,
    NetworkError,
    StsegError,
    TrainingDivergedError,
    UnreadableImageError,
    WorkdirInUseError,
    WorkdirMismatchError,
)
from stseg.functional import PseudoLabels
from stseg.inference import Skipped, evaluate
from stseg.metrics import MeanIoU
from stseg.models import IMAGENET_MEAN, IMAGENET_STD, Segmenter
from stseg.pseudo import PseudoLabeler, PseudoLabelled
from stseg.rankers import ConfidenceRanker, StabilityRanker
from stseg.ranking import Ranking
from stseg.report import write_report
from stseg.result import SelfTrainingResult
from stseg.self_training import FROM_SCRATCH, SelfTrainer
from stseg.store import MaskStore
from stseg.training import FitResult, fit
from stseg.tta import MultiScaleFlip
from stseg.version import __version__

__all__ = [
    "FROM_SCRATCH",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ConfidenceRanker",
    "Cutout",
    "DataError",
    "FitResult",
    "MaskStore",
    "MeanIoU",
    "MultiScaleFlip",
    "NetworkError",
    "PseudoLabeler",
    "PseudoLabelled",
    "PseudoLabels",
    "Ranking",
    "Segmenter",
    "SelfTrainer",
    "SelfTrainingResult",
    "Skipped",
    "StabilityRanker",
    "StrongAugment",
    "StsegError",
    "TrainConfig",
    "TrainingDivergedError",
    "UnreadableImageError",
    "WeakAugment",
    "WorkdirInUseError",
    "WorkdirMismatchError",
    "__version__",
    "data",
    "evaluate",
    "fit",
    "functional",
    "models",
    "write_report",
]
