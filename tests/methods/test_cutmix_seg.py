from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen

from stseg.augment import BoxMix
from stseg.methods import CutMixSeg
from stseg.models.state import cpu_state


def loss_by_hand(student, teacher, valid, where, threshold):
    """Share of confident pixels, and the sum over classes and mean over pixels of the squared difference."""
    rows, classes, height, width = teacher.shape
    probabilities = np.zeros(teacher.shape)
    for b, i, j in np.ndindex(rows, height, width):
        probabilities[b, :, i, j] = naive.softmax(teacher[b, :, i, j].astype(np.float64))
    sure = sum(probabilities[b, :, i, j].max() >= threshold for b, i, j in np.ndindex(*valid.shape) if valid[b, i, j])
    total, count = 0.0, 0
    for b, i, j in np.ndindex(rows, height, width):
        source = rows - 1 - b if where[b, i, j] else b
        if valid[source, i, j]:
            count += 1
            found = naive.softmax(student[b, :, i, j].astype(np.float64))
            total += sum((found[k] - probabilities[source, k, i, j]) ** 2 for k in range(classes))
    return sure / valid.sum(), total / count


class TestCutMixSeg(MethodTester):
    def make(self):
        return CutMixSeg(Network())

    def plain(self):
        return CutMixSeg(Plain(), mix=None)

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
    def test_loss_is_the_formula(self, mixed, threshold):
        method = CutMixSeg(Plain(), weight=3.0, threshold=threshold, mix=BoxMix() if mixed else None)
        method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed=1).state_dict().items()})
        one = batch()
        torch.manual_seed(4)
        where = BoxMix().draw(one.unlabeled) if mixed else torch.zeros(2, 8, 8, dtype=torch.bool)
        images = torch.where(where[:, None], one.unlabeled.flip(0), one.unlabeled)
        with torch.no_grad():
            student, teacher = method.student(images).numpy(), method.teacher(one.unlabeled).numpy()
            supervised = naive.supervised(method.student(one.images).numpy(), one.masks.numpy())
        sure, difference = loss_by_hand(student, teacher, one.valid.numpy(), where.numpy(), threshold)
        torch.manual_seed(4)
        losses = method(one)
        assert float(losses.logged["sure"]) == pytest.approx(sure, abs=1e-6)
        assert float(losses.logged["consistency"]) == pytest.approx(sure * difference, rel=1e-5)
        assert float(losses.total.detach()) == pytest.approx(supervised + 3 * sure * difference, rel=1e-5)

    def test_without_a_confident_pixel_only_labels_count(self):
        losses = CutMixSeg(Plain(), threshold=1.0)(batch())
        assert losses.total.detach() == losses.logged["supervised"]

    def test_equal_predictions_cost_nothing(self):
        assert float(CutMixSeg(Plain(), threshold=0.0, mix=None)(batch()).logged["consistency"]) == 0

    def test_the_teacher_learns_by_averaging_alone_with_its_statistics(self):
        method = self.make().train()
        before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
        seen = rows_seen(method.teacher.model.network.encoder)
        method(batch()).total.backward()
        assert seen == []  # in evaluation mode
        assert all(p.grad is None for p in method.teacher.parameters())
        assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
        assert method.teacher.training
        student = cpu_state(method.student)
        method.after_step(batch(step=0))
        for name, value in cpu_state(method.teacher.model).items():
            old = before[f"module.{name}"]
            expected = 0.99 * old + 0.01 * student[name] if value.is_floating_point() else student[name]
            torch.testing.assert_close(value, expected)
        assert not torch.equal(student["network.encoder.1.running_mean"], torch.zeros(8))

    def test_the_teacher_is_deployed_unless_told_otherwise(self):
        method = CutMixSeg(Plain())
        assert method.model is method.teacher.model
        assert CutMixSeg(Plain(), deploy="student").model.network is not method.model

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.1}, "threshold is 1.1"),
            ({"weight": -1}, "weight is -1"),
            ({"deploy": "both"}, "deploy is 'both'; expected 'teacher' or 'student'"),
            ({"decay": 2}, "decay is 2"),
        ],
    )
    def test_mistakes_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            CutMixSeg(Plain(), **options)
