"""Semi-supervised segmentation in PyTorch: methods for any network, from primitives to complete training."""

from stseg import augment, data, functional, loggers, methods, models, modules
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
    MetricError,
    NetworkError,
    NetworkWarning,
    StsegError,
    TrainingDivergedError,
    UnreadableImageError,
    WorkdirInUseError,
    WorkdirMismatchError,
    WorkdirMissingError,
)
from stseg.folder_check import Estimate, FolderCheck, check_folders
from stseg.folders import Folders, Training, train_folders
from stseg.functional import PseudoLabels
from stseg.inference.array import predict_array
from stseg.inference.boundary_iou import BoundaryIoU
from stseg.inference.evaluate import evaluate
from stseg.inference.export import export_onnx
from stseg.inference.labeler import PseudoLabeled, PseudoLabeler
from stseg.inference.mask_store import MaskStore
from stseg.inference.mean_iou import MeanIoU
from stseg.inference.plots import draw_confusion_matrix
from stseg.inference.predict import Predictions, predict, predict_mask
from stseg.inference.rankers import ConfidenceRanker, StabilityRanker
from stseg.inference.ranking import Ranking
from stseg.inference.raster import predict_raster
from stseg.inference.reading import Skipped
from stseg.loading import load
from stseg.models import IMAGENET_MEAN, IMAGENET_STD, MultiScaleFlip, Segmenter, Tiled
from stseg.self_trainer import SelfTrainer
from stseg.stages.comparison import compare_runs
from stseg.stages.report import write_report
from stseg.stages.result import SelfTrainingResult
from stseg.training import fit
from stseg.version import __version__

__all__ = [  # noqa: RUF022  grouped
    # networks
    "Segmenter",
    "MultiScaleFlip",
    "Tiled",
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
    "BoundaryIoU",
    "evaluate",
    "draw_confusion_matrix",
    # delivered predictions
    "predict",
    "predict_mask",
    "Predictions",
    # large images
    "predict_array",
    "predict_raster",
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
    "compare_runs",
    # folders
    "Folders",
    "Training",
    "train_folders",
    "check_folders",
    "FolderCheck",
    "Estimate",
    # errors
    "StsegError",
    "DataError",
    "UnreadableImageError",
    "DamagedFileError",
    "NetworkError",
    "MethodError",
    "MetricError",
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
    "loggers",
    "methods",
    "models",
    "modules",
    "__version__",
]
