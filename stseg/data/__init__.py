"""Data sets: folders and lists of images, splits, mixtures of labeled and pseudo-labeled images, synthetic scenes."""

from stseg.data.class_map import ClassMap
from stseg.data.folder import SegmentationFolder, split_by_masks
from stseg.data.listed import FilePair, ListedFiles, read_pairs
from stseg.data.mixed import MixedDataset
from stseg.data.named import NamedDataset
from stseg.data.scenes import SyntheticScenes
from stseg.data.splits import read_ids, split_ids

__all__ = [
    "ClassMap",
    "FilePair",
    "ListedFiles",
    "MixedDataset",
    "NamedDataset",
    "SegmentationFolder",
    "SyntheticScenes",
    "read_ids",
    "read_pairs",
    "split_by_masks",
    "split_ids",
]
