"""Semi-supervised segmentation in PyTorch: ST and ST++ for any network, from primitives to the whole loop."""

from stseg import data, functional, models, modules
from stseg.augment import CutMix, Cutout, StrongAugment, WeakAugment
from stseg.engine.config import TrainConfig
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
from stseg.inference.evaluate import evaluate
from stseg.inference.labeler import PseudoLabeled, PseudoLabeler
from stseg.inference.mask_store import MaskStore
from stseg.inference.mean_iou import MeanIoU
from stseg.inference.rankers import ConfidenceRanker, StabilityRanker
from stseg.inference.ranking import Ranking
from stseg.inference.sweep import Skipped
from stseg.models import IMAGENET_MEAN, IMAGENET_STD, Segmenter
from stseg.models.multi_scale import MultiScaleFlip
from stseg.self_trainer import FROM_SCRATCH, SelfTrainer
from stseg.stages.report import write_report
from stseg.stages.result import SelfTrainingResult
from stseg.training import FitResult, fit
from stseg.version import __version__

__all__ = [
    "FROM_SCRATCH",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ConfidenceRanker",
    "CutMix",
    "Cutout",
    "DataError",
    "FitResult",
    "MaskStore",
    "MeanIoU",
    "MultiScaleFlip",
    "NetworkError",
    "PseudoLabeled",
    "PseudoLabeler",
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
    "modules",
    "write_report",
]
