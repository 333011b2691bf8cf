"""Pure, batched functions on tensors of any device."""

from stseg.functional.boundaries import boundary_region
from stseg.functional.classes import one_hot
from stseg.functional.components import connected_components
from stseg.functional.confidence import expected_iou, mean_certainty, mean_confidence, mean_margin
from stseg.functional.confusion import confusion_matrix, dice, iou, mean_iou, pixel_accuracy
from stseg.functional.consistency import confident_share, consistency_loss, consistency_target, sure_share
from stseg.functional.contrast import directional_contrast
from stseg.functional.flaws import flaw_target, less_flawed_target, refine_flaws
from stseg.functional.losses import (
    adversarial_loss,
    cross_entropy,
    entropy,
    mean_over_processes,
    ohem_cross_entropy,
    squared_difference,
    supervised_loss,
    without_ignored,
)
from stseg.functional.matching import feature_matching
from stseg.functional.mixing import box_mask, class_mask, paste
from stseg.functional.pseudo_label import PseudoLabels, pseudo_label
from stseg.functional.quantiles import quantile_over_processes
from stseg.functional.ramps import linear_rampup, polynomial_decay, sigmoid_rampup
from stseg.functional.reliability import pixel_agreement, stability, weighted_stability
from stseg.functional.rotation import turn

__all__ = [
    "PseudoLabels",
    "adversarial_loss",
    "boundary_region",
    "box_mask",
    "class_mask",
    "confident_share",
    "confusion_matrix",
    "connected_components",
    "consistency_loss",
    "consistency_target",
    "cross_entropy",
    "dice",
    "directional_contrast",
    "entropy",
    "expected_iou",
    "feature_matching",
    "flaw_target",
    "iou",
    "less_flawed_target",
    "linear_rampup",
    "mean_certainty",
    "mean_confidence",
    "mean_iou",
    "mean_margin",
    "mean_over_processes",
    "ohem_cross_entropy",
    "one_hot",
    "paste",
    "pixel_accuracy",
    "pixel_agreement",
    "polynomial_decay",
    "pseudo_label",
    "quantile_over_processes",
    "refine_flaws",
    "sigmoid_rampup",
    "squared_difference",
    "stability",
    "supervised_loss",
    "sure_share",
    "turn",
    "weighted_stability",
    "without_ignored",
]
