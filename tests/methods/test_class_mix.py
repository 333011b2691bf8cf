from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen

from stseg.augment import ClassMix as Mixer
from stseg.methods import ClassMix


class TestClassMix(MethodTester):
    def make(self):
        return ClassMix(Network())

    def plain(self):
        return ClassMix(Plain(), mix=None)

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
    def test_loss_is_the_formula(self, mixed, threshold):
        method = ClassMix(Plain(), weight=3.0, threshold=threshold, mix=Mixer() if mixed else None)
        method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed=1).state_dict().items()})
        one = batch(3)
        with torch.no_grad():
            teacher = method.teacher(one.unlabeled).numpy()
        labels, confidence = naive.targets(teacher)
        valid = one.valid.numpy()
        labels[~valid] = 255
        torch.manual_seed(4)
        where = np.zeros_like(valid) if not mixed else Mixer().draw(torch.from_numpy(labels)).numpy()
        images, target, sure = one.unlabeled.numpy().copy(), labels.copy(), confidence.copy()
        for b, i, j in np.ndindex(*valid.shape):
            source = b if (where[b, i, j] or not mixed) else (b + 1) % len(valid)
            images[b, :, i, j] = one.unlabeled[source, :, i, j]
            target[b, i, j], sure[b, i, j] = labels[source, i, j], confidence[source, i, j]
        with torch.no_grad():
            logits = method.student(torch.from_numpy(images)).numpy()
            supervised = naive.supervised(method.student(one.images).numpy(), one.masks.numpy())
        share = (sure[target != 255] >= threshold).mean()
        consistency = share * naive.supervised(logits, target)
        torch.manual_seed(4)
        losses = method(one)
        assert float(losses.logged["sure"]) == pytest.approx(share, abs=1e-6)
        assert float(losses.logged["consistency"]) == pytest.approx(consistency, rel=1e-5)
        assert float(losses.total.detach()) == pytest.approx(supervised + 3 * consistency, rel=1e-5)

    def test_without_a_confident_pixel_only_labels_count(self):
        losses = ClassMix(Plain(), threshold=1.0)(batch())
        assert losses.total.detach() == losses.logged["supervised"]

    def test_the_teacher_has_statistics_of_its_own_and_no_gradients(self):
        method = self.make().train()
        seen = rows_seen(method.teacher.model.network.encoder)
        method(batch(3)).total.backward()
        assert seen == [3]
        assert all(p.grad is None for p in method.teacher.parameters())
        assert method.student.network.head.weight.grad.abs().sum() > 0

    def test_the_student_is_deployed_unless_told_otherwise(self):
        method = ClassMix(Plain())
        assert method.model is method.student
        method = ClassMix(Plain(), deploy="teacher")
        assert method.model is method.teacher.model

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": -0.1}, "threshold is -0.1"),
            ({"weight": -1}, "weight is -1"),
            ({"deploy": "both"}, "deploy is 'both'; expected 'student' or 'teacher'"),
        ],
    )
    def test_mistakes_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            ClassMix(Plain(), **options)
