from __future__ import annotations

import itertools
import multiprocessing
import ntpath
import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import stseg
from stseg.errors import DamagedFileError, DataError, WorkdirMismatchError
from stseg.inference import mask_store
from stseg.inference.mask_files import palette
from stseg.inference.mask_store import MaskStore, check_store_id
from stseg.storage.records import read_record

MASK = torch.arange(24, dtype=torch.uint8).reshape(4, 6)


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return MaskStore(None if request.param == "memory" else tmp_path / "masks")


@pytest.fixture
def on_disk(tmp_path):
    return MaskStore(tmp_path / "masks")


class TestRoundTrip:
    def test_of_all_256_indices(self, store):
        mask = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
        store["a"] = mask
        assert store["a"].dtype == torch.uint8
        assert torch.equal(store["a"], mask)

    @pytest.mark.parametrize("value", [0, 1, 255])
    def test_of_a_single_value(self, store, value):
        store["a"] = torch.full((1, 1), value, dtype=torch.uint8)
        assert store["a"].tolist() == [[value]]

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
    def test_of_16_bits_comes_back_as_int32(self, store, dtype):
        mask = torch.tensor([[0, 1, 255], [256, 300, 32767]], dtype=dtype)
        store["a"] = mask
        assert store["a"].dtype == torch.int32
        assert torch.equal(store["a"], mask.int())

    def test_of_65535(self, store):
        store["a"] = torch.tensor([[65535, 0]])
        assert store["a"].tolist() == [[65535, 0]]

    def test_of_what_is_not_contiguous(self, store):
        store["a"] = MASK.T
        assert torch.equal(store["a"], MASK.T)

    def test_of_confidence_to_within_its_steps(self, store):
        confidence = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
        confidence[0, :2] = torch.tensor([0.0, 1.0])
        store.put("a", MASK, confidence)
        found = store.confidence("a")
        assert found.dtype == torch.float32
        assert (found - confidence).abs().max() <= 0.5 / 65535 + 1e-7
        assert found[0, :2].tolist() == [0, 1]

    def test_replaces_what_is_there(self, store):
        store.put("a", MASK, torch.ones(4, 6))
        store.put("a", MASK + 1)
        assert torch.equal(store["a"], MASK + 1)
        assert store.holds("a")
        assert not store.holds("a", confidence=True)

    def test_from_many_threads(self, store):
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i: store.put(f"{i % 3}/{i}", MASK + i), range(40)))
        assert len(store) == 40
        assert all(torch.equal(store[f"{i % 3}/{i}"], MASK + i) for i in range(40))

    def test_survives_pickling(self, store):
        store["a"] = MASK
        assert torch.equal(pickle.loads(pickle.dumps(store))["a"], MASK)

    @pytest.mark.parametrize("read", [MaskStore.get, MaskStore.confidence])
    def test_of_nothing_is_a_key_error(self, store, read):
        with pytest.raises(KeyError, match="b"):
            read(store, "b")


class TestCopies:
    def test_a_change_to_what_was_put_does_not_reach_the_store(self, store):
        mask, confidence = MASK.clone(), torch.ones(4, 6)
        store.put("a", mask, confidence)
        mask.fill_(9)
        confidence.fill_(0)
        assert torch.equal(store["a"], MASK)
        assert store.confidence("a").min() == 1

    def test_a_change_to_what_was_got_does_not_reach_the_store(self, store):
        store.put("a", MASK, torch.ones(4, 6))
        store.get("a").fill_(9)
        store.confidence("a").fill_(0)
        assert torch.equal(store["a"], MASK)
        assert store.confidence("a").min() == 1


class TestRefuses:
    @pytest.mark.parametrize("mask", [torch.rand(4, 6), torch.zeros(4, 6, dtype=torch.complex64)])
    def test_floats(self, store, mask):
        with pytest.raises(TypeError, match="mask of 'a' is torch"):
            store["a"] = mask
        assert "a" not in store

    @pytest.mark.parametrize("shape", [(4,), (2, 4, 6), (0, 6)])
    def test_other_shapes(self, store, shape):
        with pytest.raises(DataError, match="mask of 'a' has"):
            store["a"] = torch.zeros(shape, dtype=torch.uint8)
        assert "a" not in store

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_on_disk_values_beyond_16_bits_and_keeps_what_is_there(self, on_disk, value):
        on_disk.put("a", MASK, torch.ones(4, 6))
        with pytest.raises(DataError, match=f"mask of 'a' holds values from .*{value}.*; expected 0..65535"):
            on_disk.put("a", torch.tensor([[3, value]]))
        assert torch.equal(on_disk["a"], MASK)
        assert on_disk.holds("a", confidence=True)

    def test_confidence_of_another_shape(self, store):
        with pytest.raises(DataError, match=r"confidence of 'a' has shape \(6, 4\); expected \(4, 6\)"):
            store.put("a", MASK, torch.ones(6, 4))

    @pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
    def test_confidence_that_is_no_probability(self, store, value):
        confidence = torch.full((4, 6), 0.5)
        confidence[2, 3] = value
        with pytest.raises(DataError, match="confidence of 'a' holds values from"):
            store.put("a", MASK, confidence)
        assert "a" not in store

    def test_a_file_in_place_of_its_folder(self, tmp_path):
        (tmp_path / "masks").write_text("")
        with pytest.raises(NotADirectoryError, match="masks is a file"):
            MaskStore(tmp_path / "masks")


class TestIds:
    hostile = (
        "", ".", "..", "../a", "a/../../b", "a/..", "/a", "//a", "a/", "a//b", "./a", "a/./b",
        "\\a", "..\\a", "a\\b", "C:/a", "c:a", "1:30", "C:\\a",
        "a\0b", "a\nb", "\x1b[0m", "x" * 300, "é" * 130, "a.confidence", "\udcff",
        "...", "CON", "ab:c", "12:30:00", "*", "shard-0f/a", "a.CONFIDENCE",
    )  # fmt: skip
    harmless = (
        "a", "a/b/c", "a.b", "a.png", "..a", "a..b", ".hidden", "a b",
        "é", "e\u0301", "日本/語", "conscious",
        "x" * 200, "a.confidence/b", "~", "$HOME", "labels",
    )  # fmt: skip

    @pytest.mark.parametrize("id", hostile)
    def test_that_cannot_name_a_file_are_refused_everywhere(self, store, id):
        for use in (
            lambda: check_store_id(id),
            lambda: store.put(id, MASK),
            lambda: store.holds(id),
        ):
            with pytest.raises(DataError, match="cannot name a file in a store"):
                use()
        assert id not in store
        assert list(store) == []

    @pytest.mark.parametrize("id", hostile)
    def test_that_leave_the_store_read_nothing(self, on_disk, id):
        for use in (on_disk.get, on_disk.confidence):
            with pytest.raises(DataError, match="cannot name a file in a store"):
                use(id)

    def test_that_are_harmless_are_kept_apart(self, store):
        for number, id in enumerate(self.harmless):
            store.put(id, MASK + number, torch.ones(4, 6))
        assert sorted(store) == sorted(self.harmless)
        assert len(store) == len(self.harmless)
        for number, id in enumerate(self.harmless):
            assert id in store
            assert torch.equal(store[id], MASK + number)

    @given(st.text(max_size=12) | st.text(alphabet="./\\:a~C", max_size=8))
    @settings(derandomize=True, deadline=None)
    def test_that_are_taken_stay_inside_the_folder(self, id):
        try:
            check_store_id(id)
        except DataError:
            return
        for join, root in ((os.path, "/r/s"), (ntpath, "C:\\r\\s")):
            path = join.normpath(join.join(root, id + ".png"))
            assert path.startswith(root + join.sep)
            assert path.count(join.sep) == root.count(join.sep) + id.count("/") + 1

    def test_of_other_types_are_not_in_it(self, store):
        store["7"] = MASK
        assert 7 not in store
        assert None not in store


class TestFiles:
    def test_are_palette_pngs_whose_indices_are_the_classes(self, on_disk):
        on_disk["a/b"] = MASK
        with Image.open(on_disk.folder / "a" / "b.png") as image:
            assert image.mode == "P"
            assert image.getpalette() == list(palette())
            assert np.array_equal(np.array(image), MASK.numpy())

    def test_are_16_bit_gray_beyond_8_bits(self, on_disk):
        on_disk["a"] = torch.tensor([[300]])
        with Image.open(on_disk.folder / "a.png") as image:
            assert image.mode.startswith("I")

    def test_of_confidence_stand_beside_the_mask_and_are_no_masks(self, on_disk):
        on_disk.put("a", MASK, torch.full((4, 6), 0.5))
        with Image.open(on_disk.folder / "a.confidence.png") as image:
            assert set(np.array(image).flatten().tolist()) == {32768}
        assert list(on_disk) == ["a"]

    def test_come_first_when_something_is_put(self, tmp_path):
        store = MaskStore(tmp_path / "a" / "b")
        assert not (tmp_path / "a").exists()
        assert list(store) == []
        store["c"] = MASK
        assert (tmp_path / "a" / "b" / "c.png").is_file()

    def test_of_a_process_before_are_found(self, on_disk):
        on_disk["a"] = MASK
        assert torch.equal(MaskStore(str(on_disk.folder))["a"], MASK)

    def test_truncated_anywhere_are_not_held(self, on_disk):
        on_disk["a"] = MASK
        path = on_disk.folder / "a.png"
        whole = path.read_bytes()
        for length in [*range(0, 60), *range(60, len(whole) - 30, 13), *range(len(whole) - 30, len(whole))]:
            path.write_bytes(whole[:length])
            assert not on_disk.holds("a"), length
        path.write_bytes(whole)
        assert on_disk.holds("a")

    def test_with_a_flipped_bit_in_the_pixels_are_not_held(self, on_disk):
        on_disk["a"] = MASK
        path = on_disk.folder / "a.png"
        whole = path.read_bytes()
        start = whole.index(b"IDAT") + 4
        for position in range(start, whole.index(b"IEND") - 8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert not on_disk.holds("a"), position

    def test_whose_confidence_is_broken_are_held_without_it_only(self, on_disk):
        on_disk.put("a", MASK, torch.ones(4, 6))
        path = on_disk.folder / "a.confidence.png"
        path.write_bytes(path.read_bytes()[:-5])
        assert on_disk.holds("a")
        assert not on_disk.holds("a", confidence=True)

    @pytest.mark.parametrize("content", [b"", b"no PNG", b"\x89PNG\r\n\x1a\n"])
    def test_that_are_broken_say_so_when_read(self, on_disk, content):
        on_disk["a"] = MASK
        (on_disk.folder / "a.png").write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"a\.png cannot be read as a PNG .*; delete .*a\.png to label"):
            on_disk["a"]

    def test_that_are_broken_can_be_replaced(self, on_disk):
        on_disk["a"] = MASK
        (on_disk.folder / "a.png").write_bytes(b"")
        on_disk["a"] = MASK
        assert on_disk.holds("a")
        assert torch.equal(on_disk["a"], MASK)

    def test_larger_than_pil_trusts_can_be_read(self, on_disk, monkeypatch):
        on_disk["a"] = MASK
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
        assert on_disk.holds("a")
        assert torch.equal(on_disk["a"], MASK)

    def test_that_were_being_written_do_not_count(self, on_disk):
        on_disk["a"] = MASK
        (on_disk.folder / ".0123456789abcdef.part").write_bytes(b"half")
        assert list(on_disk) == ["a"]


class TestSeals:
    """Of masks on disk."""

    @pytest.fixture
    def claimed(self, on_disk):
        on_disk.claim({"model": "m"})
        on_disk.put("a", MASK, torch.ones(4, 6))
        on_disk.put("b", 1 - MASK.clamp(max=1), torch.zeros(4, 6))
        return on_disk

    def refused(self, store, id, what):
        path = store.folder / f"{id}.png"
        before = path.read_bytes()
        for use in (store.get, store.holds):
            with pytest.raises(DamagedFileError, match=f"{path} {what}.*; delete {path} to label its image again"):
                use(id)
        with pytest.raises(DamagedFileError, match=f"{path} is not what this labeling wrote; delete {path} to label"):
            store.missing([id])
        assert path.read_bytes() == before

    def test_tell_exchanged_masks(self, claimed):
        one, other = claimed.folder / "a.png", claimed.folder / "b.png"
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        self.refused(claimed, "a", "was written by another labeling, or under another name")
        with pytest.raises(DamagedFileError, match=rf"a\.png and 1 more are not what .*; delete {one} and {other} to"):
            claimed.missing(["a", "b"])

    def test_tell_masks_of_another_labeler(self, claimed, tmp_path):
        other = MaskStore(tmp_path / "other")
        other.claim({"model": "n"})
        other["a"] = MASK
        (claimed.folder / "a.png").write_bytes((other.folder / "a.png").read_bytes())
        self.refused(claimed, "a", "was written by another labeling, or under another name")

    def test_tell_masks_that_were_edited(self, claimed):
        with Image.open(claimed.folder / "a.png") as image:
            image.load()
        image.putpixel((0, 0), 9)
        image.save(claimed.folder / "a.png")
        self.refused(claimed, "a", "was not written by this labeling")

    def test_tell_masks_that_were_edited_by_a_program_that_keeps_the_text(self, claimed):
        path = claimed.folder / "a.png"
        with Image.open(path) as image:
            info = PngInfo()
            info.add_text("stseg", image.info["stseg"])
            image.load()
        image.putpixel((0, 0), 9)
        image.save(path, pnginfo=info)
        with pytest.raises(DamagedFileError, match=rf"{path} was changed after it was written; delete {path} to label"):
            claimed["a"]

    def test_tell_a_confidence_that_is_no_more_the_same(self, claimed):
        one, other = claimed.folder / "a.confidence.png", claimed.folder / "b.confidence.png"
        one.write_bytes(other.read_bytes())
        assert claimed.holds("a")
        with pytest.raises(DamagedFileError, match=rf"delete {one} to label"):
            claimed.confidence("a")
        with pytest.raises(DamagedFileError, match=rf"delete {claimed.folder / 'a.png'} and {one} to label"):
            claimed.missing(["a"], confidence=True)

    def test_are_checked_by_whoever_opens_the_folder(self, claimed):
        (claimed.folder / "a.png").write_bytes((claimed.folder / "b.png").read_bytes())
        with pytest.raises(DamagedFileError, match=r"a\.png was written by another labeling"):
            MaskStore(claimed.folder)["a"]

    def test_of_many_wrong_masks_name_the_folder(self, claimed, tmp_path):
        other = MaskStore(tmp_path / "other")
        other.claim({"model": "n"})
        ids = [f"{number}" for number in range(21)]
        for id in ids:
            other[id] = MASK
            (claimed.folder / f"{id}.png").write_bytes((other.folder / f"{id}.png").read_bytes())
        with pytest.raises(DamagedFileError, match=f"and 20 more are not .*; delete {claimed.folder} to label all"):
            claimed.missing(ids)

    def test_make_the_record_dispensable(self, claimed):
        (claimed.folder / "labels.json").unlink()
        again = MaskStore(claimed.folder)
        again.claim({"model": "m"})
        assert again.missing(["a", "b"], confidence=True) == []
        (claimed.folder / "labels.json").unlink()
        with pytest.raises(WorkdirMismatchError, match="masks of unknown origin"):
            MaskStore(claimed.folder).claim({"model": "n"})

    def test_tell_masks_that_were_put_by_somebody_else(self, claimed):
        MaskStore(claimed.folder)["a"] = MASK
        self.refused(claimed, "a", "was written by another labeling")

    def test_of_one_mask_suffice_to_know_whose_the_store_is(self, claimed):
        for id in ("c", "d", "e"):
            claimed[id] = MASK
        (claimed.folder / "labels.json").unlink()
        Image.fromarray(MASK.numpy()).save(claimed.folder / "a.png")
        again = MaskStore(claimed.folder)
        again.claim({"model": "m"})
        with pytest.raises(DamagedFileError, match=rf"delete {claimed.folder / 'a.png'} to label its image again"):
            again.missing(["a", "b", "c", "d", "e"])

    def test_are_not_asked_of_masks_from_elsewhere(self, tmp_path):
        Image.fromarray(MASK.numpy()).save(tmp_path / "a.png")
        assert torch.equal(MaskStore(tmp_path)["a"], MASK)

    def test_in_place_of_a_mask_a_folder_is_named(self, claimed):
        path = claimed.folder / "a.png"
        path.unlink()
        path.mkdir()
        with pytest.raises(DamagedFileError, match=f"{path} is not what this labeling wrote; delete {path} to"):
            claimed.missing(["a"])


class TestVerify:
    def counted(self, monkeypatch, folder, verify, count, most):
        opened = []
        store = MaskStore(folder, verify=verify)
        monkeypatch.setattr(mask_store, "_MOST_VERIFIED", most)
        monkeypatch.setattr(mask_store, "holds_png", lambda path, **_: opened.append(path) or True)
        assert store.missing([str(number) for number in range(count)]) == []
        return len(opened)

    def test_says_how_many_masks_are_opened(self, on_disk, monkeypatch):
        for number in range(10):
            on_disk[str(number)] = MASK
        for verify, most, expected in [
            *(("all", 4, 10), ("none", 4, 0), ("sample", 10, 10), ("sample", 9, 5), ("sample", 5, 5), ("sample", 3, 3)),
        ]:
            with monkeypatch.context() as patched:
                assert self.counted(patched, on_disk.folder, verify, 10, most) == expected

    @pytest.mark.parametrize("verify", ["sample", "all", "none"])
    def test_finds_what_is_not_there_in_any_case(self, on_disk, verify):
        on_disk["a"] = MASK
        assert MaskStore(on_disk.folder, verify=verify).missing(["a", "b"]) == ["b"]
        assert MaskStore(on_disk.folder, verify=verify).missing(["a"], confidence=True) == ["a"]
        assert MaskStore(verify=verify).missing([]) == []

    def test_is_one_of_three(self):
        with pytest.raises(ValueError, match="verify is True; expected 'sample', 'all' or 'none'"):
            MaskStore(verify=True)


class TestShards:
    def test_spread_many_masks_of_one_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mask_store, "_MOST_IN_FOLDER", 20)
        few, many = [f"few/{number}" for number in range(20)], [f"many/{number}" for number in range(21)]
        store = MaskStore(tmp_path)
        store.expect(few)
        store.put(few[0], MASK, torch.ones(4, 6))
        assert (tmp_path / "few" / "0.png").exists()
        store.expect(few + many)
        for id in many:
            store.put(id, MASK, torch.ones(4, 6))
        folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.png")}
        assert {"few"} < folders
        assert all(re.fullmatch("shard-[0-9a-f]{2}", folder) for folder in folders - {"few"})
        assert len(folders) > 10
        assert sorted(store) == sorted([few[0], *many])
        # Found again, whatever is expected next.
        for again in (store, MaskStore(tmp_path)):
            assert again.missing([few[0], *many], confidence=True) == []
            assert torch.equal(again[many[3]], MASK)
            assert torch.equal(again[few[0]], MASK)
        before = sorted(tmp_path.rglob("*.png"))
        MaskStore(tmp_path).put(many[3], 1 - MASK.clamp(max=1), torch.ones(4, 6))
        assert sorted(tmp_path.rglob("*.png")) == before

    def test_are_used_by_a_labeler(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mask_store, "_MOST_IN_FOLDER", 3)
        images = [torch.rand(3, 6, 6) for _ in range(8)]
        network = torch.nn.Conv2d(3, 4, 1)
        labeler = stseg.PseudoLabeler(network, num_classes=4, progress=False)
        found = labeler.label(images, tmp_path)
        assert not list(tmp_path.glob("*.png"))
        assert all(torch.equal(one[1], other[1]) for one, other in zip(found, labeler.label(images), strict=True))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
        labeler.label(images, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == before


def put_for_ever(folder):
    store = MaskStore(folder)
    for number in itertools.count():
        mask = np.full((64, 64), number % 256, dtype=np.uint8)
        store.put(f"{number % 7}", torch.from_numpy(mask), torch.from_numpy(mask / 255))


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_a_process_killed_while_writing_leaves_whole_masks_only(tmp_path):
    writer = multiprocessing.get_context("fork").Process(target=put_for_ever, args=(tmp_path,))
    writer.start()
    while len(list(tmp_path.glob("?.png"))) < 7:
        assert writer.is_alive()
        time.sleep(0.005)
    writer.kill()
    writer.join()
    store = MaskStore(tmp_path)
    assert sorted(store) == [str(i) for i in range(7)]
    for id in store:
        assert store.holds(id, confidence=True)
        assert len(store[id].unique()) == 1


class TestClaim:
    def test_is_renewed_by_the_same_labeler(self, store):
        store.claim({"model": "m", "threshold": 0.5})
        store["a"] = MASK
        store.claim({"threshold": 0.5, "model": "m"})
        assert torch.equal(store["a"], MASK)

    def test_of_another_labeler_is_refused_with_the_difference(self, store):
        store.claim({"model": "m", "threshold": 0.0, "old": 1})
        with pytest.raises(WorkdirMismatchError) as caught:
            store.claim({"model": "m", "threshold": 0.5, "new": [2]})
        message = str(caught.value)
        assert "threshold is 0.0 there and 0.5 now" in message
        assert "old is 1 there and None now" in message
        assert "new is None there and [2] now" in message
        assert "model:" not in message

    def test_of_masks_of_unknown_origin_is_refused(self, store):
        store["a"] = MASK
        with pytest.raises(WorkdirMismatchError, match="masks of unknown origin"):
            store.claim({"model": "m"})

    def test_for_other_images_is_refused_each_time(self, store):
        store.claim({"model": "m"}, images={"a": 1, "b": 2})
        store["a"] = MASK
        for images in ({"a": 9}, {"a": 9}, {"c": 3, "b": 8}):
            with pytest.raises(WorkdirMismatchError, match="results of other images"):
                store.claim({"model": "m"}, images=images)
        with pytest.raises(WorkdirMismatchError, match="model is 'm' there"):
            store.claim({"model": "n"}, images={"a": 9})
        with pytest.raises(WorkdirMismatchError, match="results of other images"):
            store.claim({"model": "m"}, images={"a": 9})
        store.claim({"model": "m"}, images={"b": 2, "c": 3})

    def test_of_a_folder_with_other_files_is_granted(self, on_disk):
        on_disk.folder.mkdir()
        (on_disk.folder / "notes.txt").write_text("mine")
        on_disk.claim({"model": "m"})
        assert read_record(on_disk.folder / "labels.json") == {"model": "m"}

    def test_on_disk_holds_for_other_processes(self, on_disk):
        on_disk.claim({"model": "m"})
        with pytest.raises(WorkdirMismatchError, match="model is 'm' there and 'n' now"):
            MaskStore(on_disk.folder).claim({"model": "n"})

    def test_on_disk_is_written_again_after_the_folder_was_removed(self, on_disk):
        on_disk.claim({"model": "m"})
        (on_disk.folder / "labels.json").unlink()
        on_disk.claim({"model": "m"})
        assert (on_disk.folder / "labels.json").exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", "\xff"])
    def test_with_a_broken_record_is_refused(self, on_disk, content):
        on_disk.folder.mkdir()
        (on_disk.folder / "labels.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(
            DamagedFileError, match=r"labels\.json is damaged.*; delete .*labels\.json to write it again"
        ):
            on_disk.claim({"model": "m"})

    def test_takes_what_json_makes_of_the_owner(self, store):
        store.claim({"scales": (0.5, 1.0)})
        store.claim({"scales": [0.5, 1.0]})


def test_repr_tells_the_folder(tmp_path):
    assert repr(MaskStore()) == "MaskStore()"
    assert str(tmp_path) in repr(MaskStore(tmp_path))


def test_palette_is_that_of_pascal_voc():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip
    for index, color in known.items():
        assert palette()[3 * index : 3 * index + 3] == color
    assert len(set(zip(*[iter(palette())] * 3, strict=True))) == 256
