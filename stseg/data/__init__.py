"""Data sets: folders of images, splits, mixtures of labelled and pseudo-labelled images, drawn scenes."""

from stseg.data.folder import SegmentationFolder
from stseg.data.mixed import MixedDataset
from stseg.data.scenes import SyntheticScenes
from stseg.data.splits import read_ids, split_ids

__all__ = ["MixedDataset", "SegmentationFolder", "SyntheticScenes", "read_ids", "split_ids"]
