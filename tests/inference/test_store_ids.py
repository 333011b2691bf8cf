from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stseg
from stseg import DataError
from stseg.inference.mask_store import MaskStore
from stseg.inference.store_ids import _fault, _slow_fault, check_store_id, check_store_ids, is_store_id

LETTERS = "aAbBcCoOnNuUxXlLtTpPmM019 ./\\:-_éÉ"


class TestOne:
    @pytest.mark.parametrize(
        ("id", "fault"),
        [
            ("", "it is empty, or has an empty part"),
            ("a//b", "it is empty, or has an empty part"),
            ("a/", "it is empty, or has an empty part"),
            ("../a", "it has a part '..'"),
            ("a/./b", "it has a part '.'"),
            *((f"a{character}b", f"it contains {character!r}") for character in '?|<>"*:\\\0\n\x1f\x7f'),
            *(
                (f"{name}", f"its part '{name}' is the name of a device")
                for name in ("CON", "con", "Prn", "AUX", "nul")
            ),
            *((f"x/{name}/y", f"its part '{name}' is the name") for name in ("com1", "COM0", "LPT9", "com¹", "lpt³")),
            *((name, "is the name of a device on Windows") for name in ("com1.txt", "NUL.tar.gz", "con .a", "CONIN$")),
            ("a.", "its part 'a.' ends with '.'"),
            ("a ", "its part 'a ' ends with ' '"),
            ("a./b", "its part 'a.' ends with '.'"),
            ("a /b", "its part 'a ' ends with ' '"),
            ("...", "its part '...' ends with '.'"),
            ("\ud800", "it is not valid Unicode"),
            ("a.confidence", "it ends with '.confidence'"),
            ("a.Confidence", "it ends with '.confidence'"),
            ("shard-0f/a", "its part 'shard-0f' looks like a folder of the store"),
            ("SHARD-0F", "its part 'SHARD-0F' looks like"),
            ("x" * 241, "is longer than 255 bytes, with '.confidence.png' behind it"),
            ("é" * 121, "is longer than 255 bytes, with"),
            ("x" * 256 + "/a", "is longer than 255 bytes;"),
        ],
    )
    def test_is_refused_with_its_fault(self, id, fault):
        with pytest.raises(DataError) as caught:
            check_store_id(id)
        assert str(caught.value).startswith(f"the id {id!r} cannot name a file in a store: ")
        assert fault in str(caught.value)
        assert not is_store_id(id)

    @pytest.mark.parametrize(
        "id",
        [
            *("a", "a/b", "console", "com", "com10", "lpt", "common/x", "auxiliary", "null", "xcon", "a.con", "x.com1"),
            *(".hidden", " a", "a b", "..a", "shard-0", "shard-0fa/x", "a/shard-0f", "x" * 239, "é" * 119, "日本/語"),
            *("a.confidence.x", "confidence", "2007_000032", "a,b", "a+b", "a=b", "~", "(1)", "[1]", "#", "%20", "é"),
        ],
    )
    def test_is_accepted(self, id):
        check_store_id(id)
        check_store_ids([id])

    @given(st.text(alphabet=LETTERS, max_size=12) | st.text(max_size=12))
    @settings(max_examples=500, deadline=None)
    def test_is_judged_alike_by_the_short_way(self, id):
        assert _fault(id) == _slow_fault(id)


class TestSeveral:
    @pytest.mark.parametrize(
        ("one", "other"),
        [("a", "A"), ("x/a", "X/a"), ("é", "e\u0301"), ("straße", "STRASSE"), ("É", "e\u0301"), ("ﬁ", "FI")],
    )
    def test_that_some_systems_do_not_tell_apart_are_refused(self, one, other):
        with pytest.raises(DataError, match=f"the ids {one!r} and {other!r} differ only in letter case or Unicode"):
            check_store_ids(["first", one, "second", other])

    @pytest.mark.parametrize(
        ("file", "inside"), [("x", "x.png/y"), ("a/x", "a/x.png/y/z"), ("X", "x.PNG/y"), ("x", "x.confidence.png/y")]
    )
    def test_whose_file_is_the_folder_of_another_are_refused(self, file, inside):
        for ids in ([file, inside], [inside, file]):
            with pytest.raises(DataError, match=f"the mask of the id {file!r} is the file .*, which is the folder"):
                check_store_ids(ids)
        check_store_ids([inside])

    @given(st.lists(st.text(alphabet="aAbé./", min_size=1, max_size=6), max_size=6, unique=True))
    @settings(max_examples=100, deadline=None)
    def test_that_are_accepted_are_kept_apart_on_disk(self, tmp_path_factory, ids):
        store = MaskStore(tmp_path_factory.mktemp("store"))
        try:
            store.expect(ids)
        except DataError:
            return
        for number, id in enumerate(ids):
            store.put(id, torch.full((2, 2), number, dtype=torch.uint8), torch.full((2, 2), number / 10))
        assert [int(store.get(id)[0, 0]) for id in ids] == list(range(len(ids)))
        assert sorted(store) == sorted(ids)
        folded = [unicodedata.normalize("NFC", id.casefold()) for id in ids]
        assert len(set(folded)) == len(ids)

    def test_of_long_paths_are_refused_before_anything_is_made(self, tmp_path):
        longest = os.pathconf(tmp_path, "PC_PATH_MAX")
        deep = "/".join(["x" * 200] * (longest // 201 - 1))
        store = MaskStore(tmp_path / "masks")
        with pytest.raises(DataError, match=rf"name a file in {store.folder}: the path of its mask has \d+ bytes"):
            store.expect([f"{deep}/{'y' * 200}"])
        assert not store.folder.exists()

    def test_that_just_fit_can_be_stored(self, tmp_path):
        room = os.pathconf(tmp_path, "PC_PATH_MAX") - len(str(tmp_path))
        deep, store = "/".join(["x" * 100] * (room // 101 - 1)), MaskStore(tmp_path)
        *_, longest = (id for id in (f"{deep}/{'y' * length}" for length in range(1, 240)) if accepted(store, id))
        assert len(longest) < len(deep) + 240
        store.put(longest, torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 2))
        assert store.holds(longest, confidence=True)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a locale whose file names are ASCII")
    def test_that_the_encoding_of_names_lacks_are_refused(self, tmp_path):
        program = (
            "import sys, torch, stseg\n"
            "from stseg.inference.store_ids import check_store_ids\n"
            "from pathlib import Path\n"
            "try: check_store_ids(['plain', 'stra\\u00dfe'], Path(sys.argv[1]))\n"
            "except stseg.DataError as error: print(ascii(str(error)))"
        )
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(Path(stseg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **plain, "PYTHONPATH": path}
        command = [sys.executable, "-c", program, str(tmp_path)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert "cannot name a file here: names of files are encoded as ascii" in printed or printed == ""


def accepted(store, id):
    try:
        store.expect([id])
    except DataError:
        return False
    return True


@pytest.mark.parametrize("ids", [["a", "CON"], ["a", "A"], ["x", "x.png/y"], ["a", "b."]])
def test_a_run_refuses_ids_before_it_trains(tmp_path, ids):
    class Images(list):
        pass

    pairs = [(torch.rand(3, 8, 8), torch.randint(2, (8, 8)).byte()) for _ in range(2)]
    images = Images(torch.rand(3, 8, 8) for _ in ids)
    images.ids = ids
    config = stseg.TrainConfig(steps=3, batch_size=2, weak=None)
    options = {"num_classes": 2, "config": config, "workdir": tmp_path / "run", "progress": False}
    trainer = stseg.SelfTrainer(lambda: pytest.fail("a network is made"), **options)
    with pytest.raises(DataError, match=r"the ids? "):
        trainer.fit(pairs, images)
    assert not (tmp_path / "run").exists()
