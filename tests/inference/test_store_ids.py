from __future__ import annotations

import ast
import os
import subprocess
import sys
import unicodedata
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stseg
from stseg import DataError
from stseg.inference.mask_store import MaskStore
from stseg.inference.store_ids import _fault, _slow_fault, check_store_id, check_store_ids, is_store_id

PARTS = st.sampled_from(
    [
        "x",
        "X",
        "x.png/y",
        "X.PNG/y",
        "x.confidence",
        "x.con\ufb01dence",
        "x.Confidence.png/z",
        "labels.json",
        "LABELS.json/x",
    ]
)
LETTERS = "aAbBcCoOnNuUxXlLtTpPmM019 ./\\:-_éÉ"


class TestOne:
    @pytest.mark.parametrize(
        ("id", "fault"),
        [
            ("", "it is empty"),
            ("a//b", "it has an empty part"),
            ("a/", "it has an empty part"),
            ("../a", "it has a part '..'"),
            ("a/./b", "it has a part '.'"),
            *((f"x/a{it}b", f"its part {f'a{it}b'!r} contains {it!r}") for it in '?|<>"*:\\\0\n\x1f\x7f'),
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
            ("x/\ud800", "its part '\\ud800' is not valid Unicode"),
            ("a.confidence", "it ends with '.confidence'"),
            ("a.Confidence", "it ends with '.confidence'"),
            ("a.con\ufb01dence", "it ends with '.confidence', in other letters"),
            ("labels.json/a", "its folder 'labels.json' is a file of the store"),
            ("Labels.JSON/a", "its folder 'Labels.JSON' is a file of the store"),
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
            *(
                "labels.json",
                "a/labels.json/b",
                "a.confidence/b",
                "a.confidence.x",
                "confidence",
                "2007_000032",
                "a,b",
                "a+b",
                "a=b",
                "~",
                "(1)",
                "[1]",
                "#",
                "%20",
                "é",
            ),
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
        message = f"some systems take the id {other!r} for that of another image; {one!r} is there, which differs in "
        with pytest.raises(DataError, match=message + "(letter case|Unicode form|letter case and Unicode form)[:,]"):
            check_store_ids(["first", one, "second", other])

    def test_that_repeat_are_refused(self):
        with pytest.raises(DataError, match="the id 'a' occurs more than once"):
            check_store_ids(["a", "b", "a"])

    @pytest.mark.parametrize(
        ("file", "inside"), [("x", "x.png/y"), ("a/x", "a/x.png/y/z"), ("X", "x.PNG/y"), ("x", "x.confidence.png/y")]
    )
    def test_whose_file_is_the_folder_of_another_are_refused(self, file, inside):
        for ids in ([file, inside], [inside, file]):
            with pytest.raises(DataError, match=f"the id {file!r} needs a file .* where {inside!r} needs a folder"):
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

    @given(st.lists(st.sampled_from(["", "a", "A/"]).flatmap(lambda start: PARTS.map(start.__add__)), max_size=6))
    @settings(max_examples=300, deadline=None)
    def test_that_are_accepted_have_files_of_their_own_on_systems_that_ignore_case(self, ids):
        try:
            check_store_ids(list(dict.fromkeys(ids)))
        except DataError:
            return
        names = [id + ending for id in dict.fromkeys(ids) for ending in (".png", ".confidence.png")]
        files = [unicodedata.normalize("NFC", name.casefold()) for name in (*names, "labels.json")]
        assert len(set(files)) == len(files)
        assert not {str(folder) for file in files for folder in PurePosixPath(file).parents} & set(files)

    def test_of_a_system_that_knows_no_limits_are_accepted(self, tmp_path, monkeypatch):
        for limits in ({"PC_PATH_MAX": -1, "PC_NAME_MAX": 0}, {"PC_PATH_MAX": 0, "PC_NAME_MAX": -1}):
            monkeypatch.setattr(os, "pathconf", lambda path, name, limits=limits: limits[name], raising=False)
            check_store_ids(["a/b", "c"], tmp_path)

    def test_in_a_folder_whose_name_is_too_long_are_refused(self, tmp_path):
        folder = tmp_path.joinpath(*["x" * 200] * 30)
        with pytest.raises(DataError, match=r"the id 'a' cannot name a file in .*: the path of its mask has \d+ bytes"):
            check_store_ids(["a"], folder)

    def test_of_names_longer_than_the_file_system_takes_are_refused(self, tmp_path, monkeypatch):
        limits = {"PC_PATH_MAX": 4096, "PC_NAME_MAX": 143}  # of encrypted folders
        monkeypatch.setattr(os, "pathconf", lambda path, name: limits[name], raising=False)
        check_store_ids(["x" * 143 + "/a", "y" * 128], tmp_path)
        for id in ("x" * 144 + "/a", "a/" + "y" * 129, "é" * 65):
            with pytest.raises(DataError, match=f"the id {id!r} .*a part of it is too long.* names of 143 bytes"):
                check_store_ids(["a", id], tmp_path)

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
            "print(sys.getfilesystemencoding())\n"
            "for id, folder in (('stra\\u00dfe', ''), ('plain', 'stra\\u00dfe')):\n"
            "    try: check_store_ids(['also plain', id], Path(sys.argv[1], folder))\n"
            "    except stseg.DataError as error: print(ascii(str(error)))"
        )
        plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(Path(stseg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **plain, "PYTHONPATH": path}
        command = [sys.executable, "-c", program, str(tmp_path)]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        encoding, *errors = printed.splitlines()
        if encoding != "ascii":
            pytest.skip(f"file names are {encoding} here")
        for error, what in zip(errors, ("the id 'straße'", f"the folder '{tmp_path}/straße'"), strict=True):
            message = f"{what} cannot name a file here: names of files are encoded as ascii, which lacks 'ß'; expected"
            assert ast.literal_eval(error).startswith(message)


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
