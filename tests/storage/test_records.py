from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import linecache
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stseg
from stseg.description import describe
from stseg.errors import DamagedFileError, WorkdirMismatchError
from stseg.storage.records import claim, diff, read_record, refuse_other, write_record

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text(max_size=4), PLAIN, max_size=4)


class TestDiffering:
    @given(RECORDS)
    @settings(max_examples=40, deadline=None)
    def test_finds_nothing_where_there_is_nothing(self, record):
        assert diff(record, json.loads(json.dumps(record))) == []

    def test_names_what_is_deep_inside(self):
        found = {"config": {"lr": 0.1, "crop": [3, 4]}, "old": 1}
        now = {"config": {"lr": 0.2, "crop": [3, 5]}, "new": 2}
        assert diff(found, now) == [
            "config.lr is 0.1 there and 0.2 now",
            "config.crop is [3, 4] there and [3, 5] now",
            "old is 1 there and None now",
            "new is None there and 2 now",
        ]


def test_refusal_names_the_folder_and_takes_tuples_for_lists(tmp_path):
    refuse_other({"scale": [0.5, 2.0]}, {"scale": (0.5, 2.0)}, tmp_path, to="start over")
    with pytest.raises(WorkdirMismatchError, match=f"{tmp_path} was made with other settings or data: scale is"):
        refuse_other({"scale": [0.5, 2.0]}, {"scale": (0.5, 1.0)}, tmp_path, to="start over")


class TestFiles:
    def test_are_written_once_and_compared_afterwards(self, tmp_path):
        path = tmp_path / "deep" / "stage.json"
        claim(path, {"a": 1}, to="start over")
        claim(path, {"a": 1}, to="start over")
        assert read_record(path) == {"a": 1}
        with pytest.raises(WorkdirMismatchError, match="a is 1 there and 2 now"):
            claim(path, {"a": 2}, to="start over")
        assert read_record(path) == {"a": 1}

    def test_that_are_not_there_are_none(self, tmp_path):
        assert read_record(tmp_path / "run.json") is None

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}', b'{"a": NaN}', b'{"a": "\\ud800"}'],
    )
    def test_that_are_damaged_say_what_to_do(self, tmp_path, content):
        path = tmp_path / "run.json"
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"run\.json is damaged.*; delete .*run\.json to write it again"):
            read_record(path)

    def test_are_replaced_whole(self, tmp_path):
        write_record(tmp_path / "a.json", {"x": "ä"})
        write_record(tmp_path / "a.json", {"x": [1, 2]})
        assert read_record(tmp_path / "a.json") == {"x": [1, 2]}
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def scaled(factor):
    return lambda images: images * factor


@dataclasses.dataclass(frozen=True)
class Settings:
    strong: object = None
    shares: tuple[float, ...] = (0.5, 0.25)


class Custom:
    def __init__(self, keep):
        self.keep = keep


class SaysItself:
    def provenance(self):
        return {"weights": "1234"}


class TestDescribe:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: stseg.StrongAugment(),
            lambda: nn.Sequential(nn.Conv2d(3, 2, 1)),
            lambda: functools.partial(stseg.MultiScaleFlip, scales=(1.0,)),
            lambda: Settings(strong=stseg.StrongAugment()),
            lambda: Custom(keep=0.5),
            lambda: scaled(2),
            object,
        ],
    )
    def test_is_the_same_for_two_of_a_kind_and_of_the_types_of_json(self, make):
        assert describe(make()) == describe(make())
        text = json.dumps(describe(make()))
        assert " at 0x" not in text
        assert json.loads(text) == json.loads(json.dumps(describe(make())))

    def test_tells_settings_apart(self):
        assert describe(stseg.StrongAugment()) != describe(stseg.StrongAugment(blur_p=0.1))
        assert describe(torch.sin) != describe(torch.cos)
        assert describe(None) is None
        assert describe(Settings(strong=scaled(2))) != describe(Settings(strong=scaled(3)))
        assert describe(Custom(keep=0.5)) != describe(Custom(keep=0.6))
        assert describe(functools.partial(round, ndigits=2)) != describe(functools.partial(round, ndigits=3))
        assert describe(SaysItself()) == {"type": "SaysItself", "weights": "1234"}

    def test_of_a_lambda_does_not_change_with_the_call_around_it(self):
        def handed(function, **options):
            return function

        first = handed(lambda images: images + 1, num_workers=1)
        second = handed(
            lambda images: images + 1,
            num_workers=2,
        )
        assert describe(first).split(">")[-1] == describe(second).split(">")[-1] == " lambda images: images + 1"


def described(tmp_path, source):
    """What describes the function ``made`` of a module with this source."""
    path = tmp_path / "users.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("users", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    linecache.checkcache(str(path))
    return describe(module.made)


class TestLambdas:
    def test_show_their_own_source_and_what_they_are_bound_to(self):
        assert describe(scaled(2)) == f"{__name__}.scaled.<locals>.<lambda> [2] lambda images: images * factor"
        assert describe(scaled(2)) == describe(scaled(2)) != describe(scaled(3))

    @pytest.mark.parametrize(
        "source",
        [
            "made = lambda m: (m, 1)\n",
            "def call(f, n): return f\nmade = call(lambda m: (m, 1), 3)\n",
            "def call(f, n): return f\nmade = call(\n    lambda m: (\n        m,\n        1,\n    ),\n    3)\n",
            "table = {\n    'a': [lambda m: (m,1)], 'b': lambda n: n }\nmade = table['a'][0]\n",
        ],
    )
    def test_do_not_depend_on_the_layout_around_them(self, tmp_path, source):
        assert described(tmp_path, source) == "users.<lambda> lambda m: (m, 1)"

    @pytest.mark.parametrize("body", ["(m, 2)", "(m + 0, 1)", "[m, 1]", "m.sin()", "m.cos()"])
    def test_of_other_bodies_differ(self, tmp_path, body):
        assert described(tmp_path, f"made = lambda m: {body}\n") == f"users.<lambda> lambda m: {body}"

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="instructions know no columns")
    def test_on_one_line_are_told_apart(self):
        one, other, inner = lambda m: (m, 1), lambda m: (m, 2), (lambda m: lambda m: -m)(0)
        assert [describe(each).split("lambda> ")[1] for each in (one, other, inner)] == [
            "lambda m: (m, 1)",
            "lambda m: (m, 2)",
            "lambda m: -m",
        ]

    @pytest.mark.parametrize("arguments", ["a, b=2, *c, d=4, **e", "a, /, *, d=4", "*c", "**e", ""])
    def test_take_arguments_of_all_kinds(self, tmp_path, arguments):
        found = described(tmp_path, f"made = lambda {arguments}: 5\n")
        assert found.endswith(f"lambda {arguments}: 5" if arguments else "lambda: 5")

    def test_without_a_file_are_described_by_their_names(self):
        names = {"__name__": "prompt"}
        exec("made = lambda m, k=3: m", names)
        assert describe(names["made"]) == "prompt.<lambda> [3]"

    @pytest.mark.parametrize("now", ["made = (", "other = 1\n", "made = lambda n: n\n", ""])
    def test_whose_file_has_changed_since_are_described_by_their_names(self, tmp_path, now):
        path = tmp_path / "users.py"
        path.write_text("made = lambda m: m\n")
        spec = importlib.util.spec_from_file_location("users", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        path.write_text(now)
        linecache.checkcache(str(path))
        assert describe(module.made) == "users.<lambda>"


class TestDescribedObjects:
    def test_include_the_tensors_of_a_loss(self):
        one, other = (nn.CrossEntropyLoss(torch.tensor([1.0, w])) for w in (1.0, 2.0))
        assert describe(one) != describe(other)
        assert describe(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))) == describe(other)
        assert describe(torch.zeros(3000)) != describe(torch.zeros(3000).index_fill(0, torch.tensor([1500]), 1.0))

    def test_may_refer_to_themselves(self):
        one = Custom(keep=0.5)
        one.again = one
        assert describe(one) == {"type": "Custom", "keep": 0.5, "again": "Custom"}

    def test_tell_keyword_only_defaults_apart(self):
        def make(value):
            def function(x, *, p=value):
                return x

            function.__closure__  # noqa: B018
            return function

        assert describe(make(1)) != describe(make(2))


class TestClaim:
    def test_records_the_owner_and_collects_checksums(self, tmp_path):
        path = tmp_path / "labels.json"
        claim(path, {"model": "a"}, images={"x": 1}, to="start over")
        claim(path, {"model": "a"}, images={"y": 2}, to="start over")
        assert read_record(path) == {"model": "a", "images": {"x": 1, "y": 2}}

    def test_keeps_a_result_that_was_added(self, tmp_path):
        path = tmp_path / "thresholds.json"
        write_record(path, {**claim(path, {"model": "a"}, to="start over"), "result": [0.5]})
        assert claim(path, {"model": "a"}, to="start over")["result"] == [0.5]

    def test_refuses_another_owner_with_the_difference(self, tmp_path):
        claim(tmp_path / "a.json", {"config": {"lr": 0.1}}, to="start over")
        with pytest.raises(WorkdirMismatchError, match=r"lr is 0\.1 there and 0\.2 now.*delete /.* to start over"):
            claim(tmp_path / "a.json", {"config": {"lr": 0.2}}, to="start over")

    def test_refuses_other_images_of_the_same_ids(self, tmp_path):
        claim(tmp_path / "a.json", {"model": "a"}, images={"x": 1}, to="start over")
        with pytest.raises(WorkdirMismatchError, match="other images: the one called 'x' differs"):
            claim(tmp_path / "a.json", {"model": "a"}, images={"x": 2}, to="start over")


class TestFunctions:
    """By ``def``, in a file of the user's."""

    def described(self, path, text, **names):
        path.write_text(text)
        linecache.checkcache(str(path))
        space = dict(names)
        exec(compile(text, str(path), "exec"), space)  # as a module would
        return describe(space["pick"])

    def test_of_other_bodies_differ(self, tmp_path):
        path = tmp_path / "mine.py"
        one = self.described(path, "def pick(o):\n    return o[0]\n", __name__="mine")
        other = self.described(path, "def pick(o):\n    return o[1]\n", __name__="mine")
        same = self.described(path, "# first\n\ndef pick(o):  # this\n    return (o[0])\n", __name__="mine")
        assert one != other
        assert one == same

    def test_of_libraries_are_their_names(self):
        assert describe(textwrap.dedent) == "textwrap.dedent"

    def test_bound_to_other_lists_and_dictionaries_differ(self):
        def bound(value):
            def pick(output):
                return output[value["key"]]

            return pick

        assert describe(bound({"key": 0})) != describe(bound({"key": 1}))
        assert describe(bound({"key": 0})) == describe(bound({"key": 0}))
