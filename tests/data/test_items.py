from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from stseg.data.items import Items

IMAGE = torch.zeros(3, 4, 6, dtype=torch.uint8)
MASK = torch.zeros(4, 6, dtype=torch.uint8)


class Stream(IterableDataset):
    def __iter__(self):
        yield IMAGE, MASK


class StreamWithLength(Stream):
    def __len__(self):
        return 1


class TestWhatIsNoDataSet:
    @pytest.mark.parametrize("path", ["data/images", Path("data/images"), ""])
    def test_a_path_names_the_data_set_of_a_folder(self, path):
        with pytest.raises(TypeError, match=r"stseg\.data\.SegmentationFolder\('.*'\) makes one of a folder"):
            Items(path)

    @pytest.mark.parametrize("paths", [["a.png", "b.png"], (Path("a.png"), Path("b.png"))])
    def test_a_list_of_paths_names_listed_files(self, paths):
        with pytest.raises(TypeError, match=r"begins with 'a\.png'; .*ListedFiles\(root, paths, masks=False\)"):
            Items(paths)

    @pytest.mark.parametrize("pair", [("a.jpg", "a.png"), ["a.jpg", Path("a.png")], (Path("a.jpg"), "a.png")])
    def test_a_list_of_pairs_of_paths_names_listed_files(self, pair):
        message = (
            r"begins with \('a\.jpg', 'a\.png'\); .*ListedFiles\(root, pairs\) .*SegmentationFolder\(images, masks\)"
        )
        with pytest.raises(TypeError, match=message):
            Items([pair])

    @pytest.mark.parametrize("stream", [Stream(), StreamWithLength(), iter([IMAGE]), {1, 2}])
    def test_a_stream_says_how_to_make_one(self, stream):
        with pytest.raises(TypeError, match=r"map-style data set with a length, got \w+; list\(dataset\) makes one"):
            Items(stream)

    def test_a_loader_names_its_data_set(self):
        with pytest.raises(TypeError, match=r"got a DataLoader; its \.dataset is one, if it is map-style"):
            Items(DataLoader([(IMAGE, MASK)]))

    def test_a_mapping_of_columns_says_how_to_zip_them(self):
        with pytest.raises(
            TypeError, match=r"a dict with the keys \['images', 'masks'\]; .*list\(zip\(images, masks\)\)"
        ):
            Items({"images": [IMAGE], "masks": [MASK]})


class TestItemsOf:
    def test_a_list_of_mappings_are_read(self):
        items = Items([{"image": IMAGE, "mask": MASK}])
        assert items.ids == ["0"]
        assert torch.equal(items.image(0), IMAGE)
        assert torch.equal(items.pair(0)[1], MASK)

    def test_an_empty_list_are_none(self):
        assert len(Items([])) == 0

    def test_a_list_are_not_read_to_be_wrapped(self):
        class Unread(list):
            def __getitem__(self, index):
                raise AssertionError

        assert len(Items(Unread([IMAGE]))) == 1
