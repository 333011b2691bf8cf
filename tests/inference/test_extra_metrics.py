"""Metrics of the caller: in an evaluation, and in the history of a training."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from small import Entropic, Named, Pooled, Stopped, network, pairs
from torch import nn

import stseg
from stseg import BoundaryIoU, MeanIoU, MethodError, MetricError, SelfTrainer, TrainConfig, WeakAugment, evaluate, fit
from stseg.inference import extra_metrics

CONFIG = TrainConfig(steps=4, batch_size=2, lr=0.05, weak=WeakAugment(16), precision="fp32", save_every=0, eval_every=2)


class Errors:
    """Share of wrong pixels; without reset. Writes into what it gets, as it may."""

    made = 0

    def __init__(self):
        Errors.made += 1
        self.wrong = self.total = 0
        self.seen = []

    def update(self, prediction, target):
        self.seen.append((tuple(prediction.shape), prediction.dtype, target.dtype, 255 in target))
        prediction[target == 255] = 255
        self.wrong += int((prediction != target).sum())
        self.total += int((target != 255).sum())
        target.zero_()
        prediction.zero_()

    def compute(self):
        return self.wrong / self.total


class Resettable(Errors):
    def reset(self):
        self.wrong = self.total = 0


class Fixed:
    """A metric that computes a value, whatever it gets."""

    def __init__(self, value=0.5):
        self.value = value

    def update(self, prediction, target):
        pass

    def compute(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def reset(self):
        pass


def with_ignored(count, seed=0, size=16):
    data = pairs(count, seed=seed, size=size)
    for _, mask in data:
        mask[0] = 255
    return Named(data)


def train(metrics, *, val=None, model=None, config=CONFIG, **options):
    val = with_ignored(3, seed=9) if val is None else val
    return fit(model or network(), pairs(4), config, val=val, metrics=metrics, progress=False, **options)


class TestEvaluate:
    def test_leaves_the_values_in_the_objects(self):
        data = Named([*with_ignored(3, size=9), *with_ignored(2, size=7, seed=4)], [f"img_{i}" for i in range(5)])
        own, plain, boundary = Errors(), MeanIoU(2), BoundaryIoU(2)
        metrics = {"errors": own, "miou": plain, "boundary": boundary}
        found = evaluate(Pooled(2), data, num_classes=2, metrics=metrics, batch_size=2, progress=False)
        assert torch.equal(found.matrix, plain.matrix)
        assert own.compute() == pytest.approx(1 - found.accuracy(), abs=1e-12)
        assert 0 <= boundary.compute() <= 1
        assert own.seen == [((1, size, size), torch.int64, torch.int64, True) for size in (9, 9, 9, 7, 7)]

    def test_resets_what_can_be_reset(self):
        metric, data = MeanIoU(2), with_ignored(3)
        for _ in range(2):
            found = evaluate(Pooled(2), data, num_classes=2, metrics={"again": metric}, progress=False)
        assert torch.equal(found.matrix, metric.matrix)

    def test_changes_no_mask(self):
        data = with_ignored(3)
        before = [mask.clone() for _, mask in data]
        evaluate(Pooled(2), data, num_classes=2, metrics={"errors": Errors()}, progress=False)
        assert all(torch.equal(mask, was) for (_, mask), was in zip(data, before, strict=True))

    def test_takes_those_of_torchmetrics(self):
        torchmetrics = pytest.importorskip("torchmetrics")
        options = {"num_classes": 2, "ignore_index": 255}
        jaccard = torchmetrics.classification.MulticlassJaccardIndex(average=None, **options)
        several = torchmetrics.MetricCollection(
            {
                "accuracy": torchmetrics.classification.MulticlassAccuracy(average="micro", **options),
                "f1": torchmetrics.classification.MulticlassF1Score(average="none", **options),
            }
        )
        data = with_ignored(4)
        metrics = {"jaccard": jaccard, "several": several}
        for _ in range(2):
            found = evaluate(Pooled(2), data, num_classes=2, metrics=metrics, progress=False)
        np.testing.assert_allclose(jaccard.compute().numpy(), found.iou().numpy(), atol=1e-6)
        assert float(several.compute()["accuracy"]) == pytest.approx(found.accuracy(), abs=1e-6)
        np.testing.assert_allclose(several.compute()["f1"].numpy(), found.dice().numpy(), atol=1e-6)

    def test_names_the_one_that_raises(self):
        torchmetrics = pytest.importorskip("torchmetrics")
        without = torchmetrics.classification.MulticlassJaccardIndex(2)
        message = r"update of the metric 'jaccard' \(MulticlassJaccardIndex\) fails: RuntimeError: .*ignore index"
        with pytest.raises(MetricError, match=message):
            evaluate(Pooled(2), with_ignored(2), num_classes=2, metrics={"jaccard": without}, progress=False)

    @pytest.mark.parametrize(
        ("metrics", "message"),
        [
            ([MeanIoU(2)], "metrics is a list; expected a dictionary of metrics by name"),
            (MeanIoU(2), "metrics is a MeanIoU; expected a dictionary"),
            ({3: MeanIoU(2)}, "metrics has the name 3; expected a string"),
            ({"": MeanIoU(2)}, "metrics has the name ''"),
            ({"x": "dice"}, r"metric 'x' is a str; expected an object with update\(prediction, target\)"),
            ({"x": nn.Identity()}, "metric 'x' is a Identity; expected an object"),
            ({"x": {}}, "metric 'x' is a dict; expected an object"),
            ({"x": MeanIoU}, "metric 'x' is a function or a class; expected an object, which keeps the value"),
            ({"x": lambda: MeanIoU(2)}, "metric 'x' is a function or a class"),
        ],
    )
    def test_refuses_what_is_no_metric(self, metrics, message):
        model = Pooled(2)
        with pytest.raises(TypeError, match=message):
            evaluate(model, with_ignored(2), num_classes=2, metrics=metrics, progress=False)
        assert model.images_seen() == 0


class TestHistory:
    def test_has_the_iou_of_each_class(self, tmp_path):
        val = with_ignored(3, seed=9)
        for _, mask in val:
            mask[mask == 1] = 2
        result = fit(network(classes=4), pairs(4), CONFIG, val=val, workdir=tmp_path, progress=False)
        metric = evaluate(result.model, val, num_classes=4, progress=False)
        last = result.history[-1]
        assert [last[f"iou/{index}"] for index in range(4)] == pytest.approx(metric.iou().tolist(), nan_ok=True)
        assert last["miou"] == pytest.approx(np.nanmean(metric.iou().numpy()))
        assert math.isnan(last["iou/3"]) or last["iou/3"] == 0
        assert len(result.history) == 2

    def test_of_absent_classes_is_null_on_disk_and_nan_again(self, tmp_path):
        class Zeros(nn.Conv2d):
            def forward(self, images):
                logits = super().forward(images)
                return logits + torch.tensor([100.0, 0, 0])[:, None, None]

        def run():
            torch.manual_seed(0)
            return train(None, model=Zeros(3, 3, 1), val=empty, workdir=tmp_path / "run")

        empty = with_ignored(2)
        for _, mask in empty:
            mask[1:] = 0
        empty[0][1][5, 5] = 1
        first = run()
        assert math.isnan(first.history[0]["iou/2"])
        assert first.history[0]["iou/1"] == 0
        lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
        assert rows[0]["iou/2"] is None
        assert run().history == first.history

    def test_is_the_same_after_a_killed_run(self, tmp_path):
        def run(folder, after=None, metrics=None):
            return train(metrics, model=Stopped(network(classes=3), after=after), workdir=tmp_path / folder)

        whole = run("whole", metrics={"errors": Errors})
        with pytest.raises(KeyboardInterrupt):
            run("killed", after=3, metrics={"errors": Errors})
        rest = run("killed", metrics={"errors": Errors, "boundary": BoundaryIoU(3)})
        first, last = rest.history
        assert {**first, "seconds": 0} == {**whole.history[0], "seconds": 0}
        assert {**last, "seconds": 0} == {**whole.history[1], "seconds": 0, "boundary": last["boundary"]}

    def test_does_not_fill_the_progress_bar(self, capsys):
        fit(network(), pairs(4), CONFIG, val=pairs(2, seed=9), metrics={"own": MeanIoU(2)}, progress=True)
        shown = capsys.readouterr().err
        assert "mIoU" in shown
        assert "iou/" not in shown
        assert "own" not in shown

    def test_has_the_values_of_metrics(self):
        torchmetrics = pytest.importorskip("torchmetrics")
        jaccard = torchmetrics.classification.MulticlassJaccardIndex(2, average=None, ignore_index=255)
        metrics = {
            "jaccard": jaccard,
            "errors": Errors,
            "wrapped": torchmetrics.ClasswiseWrapper(jaccard.clone(), labels=["a", "b"], prefix="of_"),
            "mine": MeanIoU(2),
        }
        rows = []
        result = train(metrics, log=rows.append)
        assert rows == list(result.history)
        assert len(rows) == 2
        for row in rows:
            names = list(row)
            assert names[names.index("miou") + 3 :] == [
                *("jaccard/0", "jaccard/1", "errors", "wrapped/of_a", "wrapped/of_b", "mine", "seconds")
            ]
            assert all(type(value) is float for value in row.values())
            assert row["mine"] == row["miou"]
            for index, name in enumerate("ab"):
                assert row[f"jaccard/{index}"] == pytest.approx(row[f"iou/{index}"], abs=1e-6)
                assert row[f"wrapped/of_{name}"] == row[f"jaccard/{index}"]
        assert rows[0]["errors"] != rows[1]["errors"]

    def test_metrics_do_not_change_the_training(self, tmp_path):
        class Drawing(Fixed):
            def update(self, prediction, target):
                torch.rand(7)

        plain, other = train(None), train({"x": Drawing()})
        assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True))
        train({"x": Drawing()}, workdir=tmp_path)
        assert "x" in train(None, workdir=tmp_path).history[-1]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (3, {"x": 3.0}),
            (True, {"x": 1.0}),
            (np.float32(0.5), {"x": 0.5}),
            (np.array([1, 2]), {"x/0": 1.0, "x/1": 2.0}),
            (torch.tensor(0.25), {"x": 0.25}),
            (torch.tensor([0.25], dtype=torch.bfloat16, requires_grad=True), {"x/0": 0.25}),
            ([torch.tensor(1.0), 2], {"x/0": 1.0, "x/1": 2.0}),
            ((0.5,), {"x/0": 0.5}),
            ([], {}),
            ({"a": 1, "b": [2, 3]}, {"x/a": 1.0, "x/b/0": 2.0, "x/b/1": 3.0}),
            (math.nan, {"x": math.nan}),
        ],
    )
    def test_numbers_and_vectors_become_floats(self, value, expected):
        found = extra_metrics.ExtraMetrics({"x": Fixed(value)}).compute()
        assert found == pytest.approx(expected, nan_ok=True)
        assert all(type(number) is float for number in found.values())

    @pytest.mark.parametrize(
        ("value", "what"),
        [
            (torch.zeros(2, 2), r"a Tensor of shape \(2, 2\)"),
            (torch.zeros(2, dtype=torch.complex64), r"a Tensor of shape \(2,\)"),
            (None, "a NoneType"),
            ("0.5", "a str"),
            ([[1], [2, 3]], "a list"),
            ({"a": object()}, "a object"),
        ],
    )
    def test_refuses_other_values_before_training(self, value, what):
        model = Stopped(network(), after=0)
        with pytest.raises(MetricError, match=f"metric 'x.*' computed {what}; expected a number, a vector"):
            train({"x": Fixed(value)}, model=model)

    @pytest.mark.parametrize("name", ["epoch", "step", "lr", "loss", "miou", "iou", "seconds", "iou/0", "iou/7"])
    def test_refuses_the_names_of_a_row(self, name):
        for start in (lambda: train({name: MeanIoU(2)}), lambda: trainer(metrics={name: MeanIoU(2)})):
            with pytest.raises(ValueError, match=f"metrics has the name '{name}', .*; expected another name"):
                start()

    def test_refuses_a_name_inside_another(self):
        with pytest.raises(ValueError, match="the name 'a/0', as a part of 'a' is called"):
            train({"a": MeanIoU(2), "a/0": MeanIoU(2)})

    def test_refuses_a_name_that_the_method_logs(self):
        data = pairs(4)
        options = {"unlabeled": data, "val": with_ignored(2), "progress": False}
        config = TrainConfig(steps=2, batch_size=2, weak=WeakAugment(16))
        with pytest.raises(MethodError, match="Entropic logs 'entropy', which is a metric, too"):
            fit(Entropic(network()), data, config, metrics={"entropy": Fixed()}, **options)

    def test_refuses_methods_that_log_the_iou_of_a_class(self):
        class Logging(stseg.Method):
            uses_unlabeled = False

            def __init__(self):
                super().__init__()
                self.model = stseg.Segmenter(network())

            def forward(self, batch):
                return stseg.Losses(self.model(batch.images).mean(), {"iou/0": torch.tensor(1.0)})

        with pytest.raises(MethodError, match="logs 'iou/0', a name of the history itself"):
            fit(Logging(), pairs(4), CONFIG, progress=False)

    def test_refuses_metrics_without_reset_or_validation(self):
        message = r"metric 'errors' is a Errors without reset\(\).*metrics=\{'errors': lambda: Errors\(\.\.\.\)\}"
        with pytest.raises(TypeError, match=message):
            train({"errors": Errors()})
        with pytest.raises(ValueError, match=r"metrics need a validation set \(val\)"):
            fit(network(), pairs(4), CONFIG, metrics={"own": MeanIoU(2)}, progress=False)
        with pytest.raises(ValueError, match=r"metrics need a validation set \(val\)"):
            trainer(metrics={"own": MeanIoU(2)}).fit(pairs(4), [image for image, _ in pairs(4, seed=3)])
        with pytest.raises(TypeError, match="metric 'x' made a dict"):
            train({"x": dict})
        with pytest.raises(MetricError, match=r"call of the metric 'x' .* fails: TypeError"):
            train({"x": MeanIoU})

    def test_names_the_metric_that_raises(self):
        class Broken(Fixed):
            def update(self, prediction, target):
                raise KeyError("lost")

        with pytest.raises(MetricError, match=r"update of the metric 'x' \(Broken\) fails: KeyError: 'lost'; it gets"):
            train({"x": Broken()}, model=Stopped(network(), after=0))
        with pytest.raises(MetricError, match=r"compute of the metric 'x' \(Fixed\) fails: ZeroDivisionError"):
            train({"x": Fixed(ZeroDivisionError("division by zero"))})

    def test_a_metric_that_needs_more_than_one_image_is_no_error(self):
        class Demanding(Resettable):
            def compute(self):
                if self.total < 16 * 17:
                    raise ZeroDivisionError
                return super().compute()

        assert "x" in train({"x": Demanding()}).history[-1]

    def test_numbers_each_training_of_a_run(self, tmp_path):
        rows = []
        options = {"metrics": {"own": MeanIoU(2), "errors": Errors}, "log": rows.append, "workdir": tmp_path}
        images = [image for image, _ in pairs(4, seed=3)]
        result = trainer(**options).fit(pairs(4), images, with_ignored(2, seed=9))
        assert all(row["own"] == row["miou"] for stage in result.stages.values() for row in stage.history)
        assert {"teacher/own", "student/errors", "student/iou/1"} <= {name for row in rows for name in row}
        again = trainer(workdir=tmp_path).fit(pairs(4), images, with_ignored(2, seed=9))
        assert again.stages["student"].history == result.stages["student"].history


def trainer(**options):
    options = {"num_classes": 2, "config": CONFIG, "method": "st", "progress": False, **options}
    return SelfTrainer(network, **options)


class TestSeveralProcesses:
    def test_refuses_what_would_see_a_part_alone(self, monkeypatch):
        monkeypatch.setattr(extra_metrics, "world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"metric 'x' \(Fixed\) would see the images of one of the 2 processes"):
            extra_metrics.ExtraMetrics({"x": Fixed()})
        extra_metrics.ExtraMetrics({"x": MeanIoU(2), "y": BoundaryIoU(2)})

    def test_takes_what_torchmetrics_synchronizes(self, monkeypatch):
        torchmetrics = pytest.importorskip("torchmetrics")
        monkeypatch.setattr(extra_metrics, "world_size", lambda: 2)
        jaccard = torchmetrics.classification.MulticlassJaccardIndex(2)
        extra_metrics.ExtraMetrics({"x": jaccard, "y": torchmetrics.MetricCollection([jaccard])})
        alone = torchmetrics.classification.MulticlassJaccardIndex(2, sync_on_compute=False)
        for metric in (alone, torchmetrics.MetricCollection([alone])):
            with pytest.raises(ValueError, match="sync_on_compute=True"):
                extra_metrics.ExtraMetrics({"x": metric})
