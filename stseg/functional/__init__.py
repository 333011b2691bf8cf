"""The mathematics: pure, batched functions on tensors of any device."""

from stseg.functional.confidence import expected_iou, mean_certainty, mean_confidence, mean_margin
from stseg.functional.confusion import confusion_matrix, iou, mean_iou
from stseg.functional.pseudo_label import PseudoLabels, pseudo_label
from stseg.functional.reliability import pixel_agreement, stability, weighted_stability

__all__ = [
    "PseudoLabels",
    "confusion_matrix",
    "expected_iou",
    "iou",
    "mean_certainty",
    "mean_confidence",
    "mean_iou",
    "mean_margin",
    "pixel_agreement",
    "pseudo_label",
    "stability",
    "weighted_stability",
]
