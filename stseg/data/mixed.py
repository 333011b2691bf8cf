"""One training set of labeled and pseudo-labeled images."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from stseg.data.convert import pair_of
from stseg.data.items import Items, shared
from stseg.errors import DataError
from stseg.types import PairTransform


class MixedDataset(Dataset[tuple[Tensor, Tensor, bool]]):
    """Mixture on which ST and ST++ retrain (Yang et al., CVPR 2022, section 3.1).

    The labeled items, over-sampled to about the number of pseudo-labeled ones, followed by the
    pseudo-labeled items; shuffling is left to the loader.

    Args:
        labeled: items ``(image, mask)``.
        pseudo: items ``(image, mask)`` with pseudo-masks, such as :class:`stseg.PseudoLabeled`; or None.
        transform: ``(image, mask) -> (image, mask)`` for every item, such as :class:`stseg.WeakAugment`.
        repeat: how often to repeat the labeled items; by default ``ceil(len(pseudo) / len(labeled))`` times, and
            once without ``pseudo``.

    Attributes:
        item_names: name of each item in messages; those of labeled items are repeated.

    Shape:
        Items are the image, ``(C, H, W)`` uint8 or float32 in [0, 1]; the mask, ``(H, W)`` uint8 or int32;
        and whether it is a pseudo-mask, a bool. Without ``transform``, the tensors may be those of the data sets
        themselves, not copies.

    Raises:
        DataError: if a data set is empty, or an id is in both: the network would see the image with its true
            mask and with a predicted one. When an item is read, if its mask is missing or differs from the image
            in size.
        ValueError: if ``repeat`` is less than 1.

    Example:
        >>> import torch
        >>> pair = torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8)
        >>> mixed = MixedDataset([pair] * 2, [pair] * 5)
        >>> [is_pseudo for image, mask, is_pseudo in mixed]
        [False, False, False, False, False, False, True, True, True, True, True]
    """

    def __init__(
        self,
        labeled: Dataset[Any],
        pseudo: Dataset[Any] | None = None,
        *,
        transform: PairTransform | None = None,
        repeat: int | None = None,
    ) -> None:
        annotated, predicted = _items(labeled, "labeled"), None if pseudo is None else _items(pseudo, "pseudo-labeled")
        others = 0 if predicted is None else len(predicted)
        self.repeat = max(1, -(-others // len(annotated))) if repeat is None else operator.index(repeat)
        if self.repeat < 1:
            raise ValueError(f"repeat is {repeat}; expected 1 or more")
        if predicted is not None and annotated.has_ids and predicted.has_ids:
            both = shared(annotated.names, predicted.names)
            if both is not None:
                raise DataError(f"the id {both!r} is in both the labeled and the pseudo-labeled data set")
        self.labeled, self.pseudo, self.transform = annotated, predicted, transform
        self.item_names = annotated.names * self.repeat + (predicted.names if predicted is not None else [])

    def __len__(self) -> int:
        return len(self.item_names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        position = range(len(self))[index]
        from_pseudo = position - len(self.labeled) * self.repeat
        if from_pseudo < 0 or self.pseudo is None:
            image, mask = self.labeled.pair(position % len(self.labeled))
        else:
            image, mask = self.pseudo.pair(from_pseudo)
        if self.transform is not None:
            image, mask = pair_of(self.transform(image.clone(), mask.clone()), name=self.item_names[position])
        return image, mask, from_pseudo >= 0


def _items(dataset: Dataset[Any], name: str) -> Items:
    items = Items.of(dataset)
    if not len(items):
        raise DataError(f"the {name} data set is empty")
    return items
