"""What a run tells while it goes on: lines where there is no terminal, the log, early warnings."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import sys

import pytest
import torch
from small import Stopped, network, pairs
from torch import nn

import stseg
from stseg import progress
from stseg.methods import ST, FixMatch
from stseg.stages.labeling import Labeling

CONFIG = stseg.TrainConfig(steps=6, batch_size=2, weak=stseg.WeakAugment(16), eval_every=2)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("stseg.progress.time.monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def drive(clock, capsys, *, total, seconds, initial=0, stop=None, **options):
    """Lines of work whose units take ``seconds`` each."""
    with progress.progress_bar(title="teacher", total=total, initial=initial, show=True, **options) as bar:
        for _ in range(initial, stop or total):
            clock.now += seconds
            bar.set_postfix({"loss": "0.410"}, refresh=False)
            bar.update()
    written = capsys.readouterr().err
    assert "\r" not in written
    assert written == "" or written.endswith("\n")
    return written.splitlines()


class TestLines:
    def test_tell_the_first_the_last_and_some_in_between(self, clock, capsys):
        assert drive(clock, capsys, total=100, seconds=1) == [
            "teacher: 1/100 steps, 1 %, loss 0.410",
            "teacher: 31/100 steps, 31 %, 1.0 steps/s, loss 0.410, 1 min left",
            "teacher: 61/100 steps, 61 %, 1.0 steps/s, loss 0.410, 39 s left",
            "teacher: 91/100 steps, 91 %, 1.0 steps/s, loss 0.410, 9.0 s left",
            "teacher: 100/100 steps, 100 %, 1.0 steps/s, loss 0.410, after 2 min",
        ]

    def test_of_work_that_resumes_count_what_is_done_now(self, clock, capsys):
        lines = drive(clock, capsys, total=100, seconds=20, initial=90)
        assert lines[0] == "teacher: 91/100 steps, 91 %, loss 0.410"
        assert lines[1] == "teacher: 93/100 steps, 93 %, 20.0 s/step, loss 0.410, 2 min left"

    def test_are_rare_in_long_work(self, clock, capsys):
        lines = drive(clock, capsys, total=100_000, seconds=1)
        assert len(lines) < 400
        done = [int(re.search(r" (\d+)/", line)[1]) for line in lines]
        assert max(b - a for a, b in itertools.pairwise(done)) <= 301
        assert min(b - a for a, b in itertools.pairwise(done)) >= 30

    def test_tell_where_it_stopped(self, clock, capsys):
        assert drive(clock, capsys, total=100, seconds=1, stop=20)[-1].startswith("teacher: 20/100 steps, 20 %, ")

    def test_of_a_single_step_or_none(self, clock, capsys):
        assert drive(clock, capsys, total=1, seconds=1) == ["teacher: 1/1 steps, 100 %, loss 0.410, after 1.0 s"]
        assert drive(clock, capsys, total=0, seconds=1) == []
        assert drive(clock, capsys, total=5, initial=5, seconds=1) == []

    def test_estimate_nothing_until_enough_is_done(self, clock, capsys):
        lines = drive(clock, capsys, total=40, seconds=10, warm_up=16, unit="image")
        assert [line for line in lines[:5] if "left" in line] == []
        assert lines[6] == "teacher: 19/40 images, 48 %, 10.0 s/image, loss 0.410, 4 min left"

    def test_are_not_written_where_nothing_is_shown(self, capsys):
        with progress.progress_bar(title="teacher", total=3, show=False) as bar:
            bar.update(3)
        assert capsys.readouterr().err == ""

    def test_are_a_bar_on_a_terminal(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with progress.progress_bar(title="teacher", total=3, show=True) as bar:
            bar.update(3)
            progress.show_message("a message")
        written = sys.stderr.getvalue()
        assert "\rteacher:" in written
        assert "3/3" in written
        assert "\r\na message" not in written.replace(" ", "")
        assert re.search(r"[\r\n]a message\n", written)  # on a line of its own


def test_a_bar_shows_no_time_left_until_enough_is_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress_bar(title="rank", total=148, show=True, warm_up=16) as bar:
        bar.start_t -= 100
        bar.update(8)
        assert re.search(r"<\?, +\?it/s", str(bar))
        bar.update(42)
        assert "<03:1" in str(bar)  # 98 more at 2 s each


SIZES = [(20 + index % 13, 24) for index in range(80)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_count_when_they_are_computed(monkeypatch, batch_size):
    """Results come in the order of the images; where sizes differ, the first one waits while others are computed."""
    images = [torch.rand(3, *size) for size in SIZES]
    seen = []

    class Bar(progress.Lines):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr("stseg.progress.Lines", Bar)
    net = nn.Conv2d(3, 2, 1)
    labeler = stseg.PseudoLabeler(net, num_classes=2, batch_size=batch_size)
    labeler.label(images)
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert seen[-1] == len(images)
    assert max(steps) <= batch_size


def test_images_that_are_skipped_count_at_the_end(capsys):
    class Broken(list):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("broken")
            return super().__getitem__(index)

    labeler = stseg.PseudoLabeler(nn.Conv2d(3, 2, 1), num_classes=2)
    labeled = labeler.label(Broken(image for image, _ in pairs(5)), skip_unreadable=True)
    assert len(labeled) == 4
    assert "label: 5/5 images, 100 %" in capsys.readouterr().err


def trainer(**options):
    options = {"num_classes": 2, "config": CONFIG, "method": "st", "progress": False, **options}
    return stseg.SelfTrainer(network, **options)


IMAGES = [image for image, _ in pairs(6, seed=1)]


class TestLog:
    def test_names_what_starts_and_what_is_done(self, caplog, tmp_path, capsys):
        caplog.set_level(logging.INFO, "stseg")
        run = trainer(method="st++", workdir=tmp_path)
        run.fit(pairs(3), IMAGES, pairs(2, seed=2))
        time = r"\d+(\.\d)? (s|min)"
        expected = [
            r"teacher: training for 6 steps",
            rf"teacher: trained for 6 steps in {time}, \d+ % of it in validation; mIoU \d+\.\d % on validation",
            r"ranking: ranking 6 images",
            rf"ranking: ranked 6 images in {time}",
            r"reliable: labeling 3 images",
            rf"reliable: labeled 3 images in {time}",
            r"student-1: training for 6 steps",
            rf"student-1: trained for 6 steps in {time}.*",
            r"unreliable: labeling 3 images",
            rf"unreliable: labeled 3 images in {time}",
            r"student-2: training for 6 steps",
            rf"student-2: trained for 6 steps in {time}.*",
        ]
        assert {record.name for record in caplog.records} == {"stseg"}
        for record, pattern in zip(caplog.records, expected, strict=True):
            assert re.fullmatch(pattern, record.message), record.message
            assert record.levelno == logging.INFO
        assert capsys.readouterr().err == ""  # with progress=False, and no handler but that of the test

        caplog.clear()
        run.fit(pairs(3), IMAGES, pairs(2, seed=2))
        again = [record.message for record in caplog.records]
        assert re.fullmatch(rf"teacher: was trained before, in {time}; taken from {tmp_path}/teacher", again[0])
        assert again[1] == f"ranking: 6 images were ranked before; taken from {tmp_path}/ranking/ranking.csv"
        assert f"reliable: 3 images were labeled before; taken from {tmp_path}/reliable/masks" in again
        assert len([message for message in again if "before" in message]) == 6

    def test_names_where_a_training_resumes(self, caplog, tmp_path):
        caplog.set_level(logging.INFO, "stseg")
        config = stseg.TrainConfig(steps=6, batch_size=2, weak=stseg.WeakAugment(16), save_every=0)
        with pytest.raises(KeyboardInterrupt):
            stseg.fit(Stopped(network(), after=4), pairs(4), config, workdir=tmp_path, progress=False)
        stseg.fit(Stopped(network()), pairs(4), config, workdir=tmp_path, progress=False)
        assert "train: training resumes after step 4 of 6 steps" in caplog.text

    def test_names_images_that_are_left_out(self, caplog):
        class Broken(list):
            def __getitem__(self, index):
                if index in (1, 2):
                    raise OSError("broken")
                return super().__getitem__(index)

        caplog.set_level(logging.WARNING, "stseg")
        trainer(skip_unreadable=True).fit(pairs(3), Broken(IMAGES))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.message == "left out 2 unlabeled images that cannot be read, first '1': item '1': broken"

    def test_has_no_handler_that_writes(self):
        assert [type(handler) for handler in logging.getLogger("stseg").handlers] == [logging.NullHandler]


class StoppedFixMatch(FixMatch):
    """FixMatch in which Ctrl+C is pressed in the step after ``_after`` are done."""

    _after = None

    def after_step(self, batch):
        if batch.step == self._after:
            raise KeyboardInterrupt


class TestWarnings:
    @pytest.mark.parametrize("handler", [True, False])
    def test_are_shown_once(self, capsys, handler):
        log = logging.getLogger("stseg")
        shown = logging.StreamHandler(sys.stderr)
        if handler:
            log.addHandler(shown)
        try:
            progress.warn_of_run("teacher: something", show=True)
        finally:
            log.removeHandler(shown)
        assert capsys.readouterr().err == ("" if handler else "warning: ") + "teacher: something\n"

    def test_are_not_shown_without_progress(self, capsys, caplog):
        progress.warn_of_run("teacher: something", show=False)
        assert capsys.readouterr().err == ""
        assert caplog.messages == ["teacher: something"]

    def test_of_a_training_survive_a_kill(self, caplog, tmp_path):
        config = stseg.TrainConfig(steps=8, batch_size=2, weak=stseg.WeakAugment(16), eval_every=1, save_every=0)

        def run(after):
            method = StoppedFixMatch(network(), threshold=1.0)
            method._after = after
            return stseg.fit(method, pairs(4), config, unlabeled=IMAGES, workdir=tmp_path, progress=False)

        with pytest.raises(KeyboardInterrupt):
            run(5)
        result, found = run(None), run(None)
        assert [text[:33] for text in result.warnings] == ["since step 0, until step 3, fewer"]
        assert found.warnings == result.warnings
        assert caplog.text.count("fewer than 1.0 %") == 1
        assert json.loads((tmp_path / "progress.json").read_text())["warnings"] == {"unsure": result.warnings[0]}

    def test_of_a_class_that_vanishes_survive_a_resume(self, caplog, tmp_path, capsys):
        """The network of the teacher predicts one class, whatever the image."""
        run = trainer(method=ST(labeling=Labeling(tta=None)), workdir=tmp_path, progress=True)
        teacher = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            teacher.weight.zero_()
            teacher.bias.copy_(torch.tensor([5.0, 0.0]))
        images = [image for image, _ in pairs(12, seed=1)]
        for count in (1, 0):
            result = run.fit(pairs(3), images, teacher=teacher)
            assert list(result.warnings) == ["labels"]
            (text,) = result.warnings["labels"]
            assert text.startswith("the pseudo-masks hold class 1 in 0.000 % of their pixels, the labeled masks in ")
            assert caplog.text.count("labels: the pseudo-masks hold class 1") == count
            assert capsys.readouterr().err.count("warning: labels: the pseudo-masks hold class 1") == count
            caplog.clear()

    def test_of_masks_that_keep_nothing(self, caplog):
        run = trainer(method=ST(labeling=Labeling(tta=None, threshold=1.0)))
        result = run.fit(pairs(3), IMAGES)
        assert any("keep 0.00 % of the pixels" in text for text in result.warnings["labels"])

    def test_of_a_single_class_on_validation(self):
        class Constant(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(1))

            def forward(self, x):
                return torch.stack([x[:, 0] * 0 + 9, x[:, 0] * self.weight], 1)

        result = stseg.fit(Constant(), pairs(4), CONFIG, val=pairs(2, seed=1), progress=False)
        if not any(name.startswith("iou/") for name in result.history[0]):
            pytest.skip("rows hold no IoU of the classes")
        assert "finds class 0 alone at step 4" in result.warnings[0]

    def test_there_are_none_in_a_run_that_learns(self, caplog):
        caplog.set_level(logging.WARNING, "stseg")
        config = stseg.TrainConfig(steps=40, batch_size=4, weak=stseg.WeakAugment(16), lr=0.05)
        result = trainer(config=config).fit(pairs(4), IMAGES, pairs(3, seed=2))
        assert result.warnings == {}
        assert caplog.records == []


class TestSlowValidation:
    def fit(self, monkeypatch, tmp_path, seconds):
        """Train where each validation takes so many seconds, and all else none."""
        now = [0.0]

        def evaluate(*arguments, **options):
            now[0] += seconds
            return real(*arguments, **options)

        real = stseg.evaluate
        monkeypatch.setattr("stseg.engine.loop.evaluate", evaluate)
        for module in ("loop", "watch"):
            monkeypatch.setattr(f"stseg.engine.{module}.time", type("time", (), {"monotonic": lambda: now[0]}))
        return stseg.fit(network(), pairs(4), CONFIG, val=pairs(2, seed=1), workdir=tmp_path, progress=False)

    def test_is_told_once_and_kept_in_the_result(self, monkeypatch, caplog, tmp_path):
        caplog.set_level(logging.INFO, "stseg")
        result = self.fit(monkeypatch, tmp_path, 20)
        assert (result.val_seconds, result.seconds) == (60, 60)
        assert caplog.text.count("train: validation takes 100 % of the time (20.0 s each)") == 1
        assert "eval_every=6), now 2," in caplog.text
        assert "in 1 min, 100 % of it in validation" in caplog.text
        assert self.fit(monkeypatch, tmp_path, 20).val_seconds == 60

    def test_is_not_told_of_where_it_is_quick(self, monkeypatch, caplog, tmp_path):
        caplog.set_level(logging.WARNING, "stseg")
        self.fit(monkeypatch, tmp_path, 1)
        assert caplog.records == []
