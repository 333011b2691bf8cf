"""The formulas of the methods, pixel by pixel."""

from __future__ import annotations

import numpy as np


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def cross_entropy(z: np.ndarray, label: int) -> float:
    return float(-np.log(softmax(z.astype(np.float64))[label]))


def supervised(logits: np.ndarray, masks: np.ndarray, ignore: int = 255) -> float:
    """Mean over the pixels with a label."""
    losses = [
        cross_entropy(logits[b, :, i, j], masks[b, i, j])
        for b, i, j in np.ndindex(*masks.shape)
        if masks[b, i, j] != ignore
    ]
    return sum(losses) / max(1, len(losses))


def targets(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label and confidence of each pixel."""
    rows, _, height, width = logits.shape
    label, confidence = np.zeros((rows, height, width), dtype=int), np.zeros((rows, height, width))
    for b, i, j in np.ndindex(rows, height, width):
        label[b, i, j] = logits[b, :, i, j].argmax()
        confidence[b, i, j] = softmax(logits[b, :, i, j].astype(np.float64)).max()
    return label, confidence


def consistency(
    logits: np.ndarray, label: np.ndarray, confidence: np.ndarray, valid: np.ndarray, threshold: float
) -> float:
    """Sum over the confident valid pixels by the number of valid ones."""
    total, count = 0.0, 0
    for b, i, j in np.ndindex(*label.shape):
        if valid[b, i, j]:
            count += 1
            if confidence[b, i, j] >= threshold:
                total += cross_entropy(logits[b, :, i, j], label[b, i, j])
    return total / max(1, count)


def paste(box: tuple[int, int, int, int], rows: np.ndarray) -> np.ndarray:
    """Each row with the box of its partner, the batch in reverse order; the last two axes are height and width."""
    top, left, bottom, right = box
    mixed = rows.copy()
    for b in range(len(rows)):
        mixed[b, ..., top:bottom, left:right] = rows[len(rows) - 1 - b, ..., top:bottom, left:right]
    return mixed
