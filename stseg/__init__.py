"""Semi-supervised segmentation in PyTorch: methods for any network, from primitives to complete training."""

from stseg import augment, data, functional, methods, models, modules
from stseg.augment import ClassMix, CutMix, Cutout, StrongAugment, WeakAugment
from stseg.engine.checkpoint import load_weights, save_weights
from stseg.engine.config import TrainConfig
from stseg.engine.loop import FitResult
from stseg.engine.method import Batch, Losses, Method
from stseg.errors import (
    DamagedFileError,
    DataError,
    DataWarning,
    MethodError,
    NetworkError,
    NetworkWarning,
    StsegError,
    TrainingDivergedError,
    UnreadableImageError,
    WorkdirInUseError,
    WorkdirMismatchError,
    WorkdirMissingError,
)
from stseg.functional import PseudoLabels
from stseg.inference.evaluate import evaluate
from stseg.inference.export import export_onnx
from stseg.inference.labeler import PseudoLabeled, PseudoLabeler
from stseg.inference.mask_store import MaskStore
from stseg.inference.mean_iou import MeanIoU
from stseg.inference.rankers import ConfidenceRanker, StabilityRanker
from stseg.inference.ranking import Ranking
from stseg.inference.reading import Skipped
from stseg.loading import load
from stseg.models import IMAGENET_MEAN, IMAGENET_STD, MultiScaleFlip, Segmenter
from stseg.self_trainer import SelfTrainer
from stseg.stages.report import write_report
from stseg.stages.result import SelfTrainingResult
from stseg.training import fit
from stseg.version import __version__

__all__ = [  # noqa: RUF022  grouped
    # networks
    "Segmenter",
    "MultiScaleFlip",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    # augmentation
    "WeakAugment",
    "StrongAugment",
    "Cutout",
    "CutMix",
    "ClassMix",
    # labeling, ranking, evaluation
    "PseudoLabeler",
    "PseudoLabeled",
    "PseudoLabels",
    "StabilityRanker",
    "ConfidenceRanker",
    "Ranking",
    "MaskStore",
    "Skipped",
    "MeanIoU",
    "evaluate",
    # training
    "Method",
    "Batch",
    "Losses",
    "TrainConfig",
    "fit",
    "FitResult",
    "load",
    "load_weights",
    "save_weights",
    "export_onnx",
    "SelfTrainer",
    "SelfTrainingResult",
    "write_report",
    # errors
    "StsegError",
    "DataError",
    "UnreadableImageError",
    "DamagedFileError",
    "NetworkError",
    "MethodError",
    "TrainingDivergedError",
    "WorkdirMismatchError",
    "WorkdirInUseError",
    "WorkdirMissingError",
    "DataWarning",
    "NetworkWarning",
    # modules
    "augment",
    "data",
    "functional",
    "methods",
    "models",
    "modules",
    "__version__",
]
