from __future__ import annotations

import copy
import math

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch

from stseg.methods import MeanTeacher
from stseg.models.state import cpu_state


def mean_square(student: np.ndarray, teacher: np.ndarray, valid: np.ndarray, *, probabilities: bool) -> float:
    total, count = 0.0, 0
    for b, i, j in np.ndindex(*valid.shape):
        if valid[b, i, j]:
            one, other = student[b, :, i, j], teacher[b, :, i, j]
            if probabilities:
                one, other = naive.softmax(one), naive.softmax(other)
            total += float(((one - other) ** 2).sum())
            count += len(one)
    return total / max(1, count)


class TestMeanTeacher(MethodTester):
    def make(self):
        return MeanTeacher(Network())

    def plain(self):
        return MeanTeacher(Plain(), strong=None)

    @pytest.mark.parametrize("space", ["softmax", "logits"])
    @pytest.mark.parametrize("include_labeled", [False, True])
    def test_loss_is_the_formula(self, space, include_labeled):
        method = MeanTeacher(
            Plain(), weight=7.0, rampup=0.75, strong=None, space=space, include_labeled=include_labeled
        )
        method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed=1).state_dict().items()})
        one = batch(step=3, steps=8)  # half of the ramp-up
        with torch.no_grad():
            student = {name: method.student(x).numpy() for name, x in (("l", one.images), ("u", one.unlabeled))}
            teacher = {name: method.teacher(x).numpy() for name, x in (("l", one.images), ("u", one.unlabeled))}
        valid = one.valid.numpy()
        if include_labeled:
            student["u"], teacher["u"] = (np.concatenate([z["l"], z["u"]]) for z in (student, teacher))
            valid = np.concatenate([np.ones_like(valid), valid])
        supervised = naive.supervised(student["l"], one.masks.numpy())
        consistency = mean_square(student["u"], teacher["u"], valid, probabilities=space == "softmax")
        losses = method(one)
        assert float(losses.logged["consistency"]) == pytest.approx(consistency, rel=1e-5)
        ramp = math.exp(-5 * (1 - 3 / 6) ** 2)
        assert float(losses.total.detach()) == pytest.approx(supervised + 7 * ramp * consistency, rel=1e-5)

    def test_without_ramp_up_the_weight_is_full_from_the_start(self):
        method = MeanTeacher(Plain(), weight=2.0, rampup=0, strong=None)
        method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed=1).state_dict().items()})
        losses = method(batch(step=0))
        expected = losses.logged["supervised"] + 2 * losses.logged["consistency"]
        assert float(losses.total.detach()) == pytest.approx(float(expected))

    def test_the_teacher_gets_no_gradient(self):
        method = self.make().train()
        method(batch()).total.backward()
        assert all(p.grad is None for p in method.teacher.parameters())
        assert not any(p.requires_grad for p in method.teacher.parameters())

    def test_the_average_follows_the_schedule(self):
        method = MeanTeacher(Plain(), decay=0.6, strong=None)
        average = cpu_state(method.teacher.model)
        for step, decay in enumerate([0.0, 0.5, 0.6, 0.6]):
            for p in method.student.parameters():
                p.data.add_(torch.rand_like(p))
            method.after_step(batch(step=step))
            average = {name: decay * average[name] + (1 - decay) * v for name, v in cpu_state(method.student).items()}
            for name, value in cpu_state(method.teacher.model).items():
                torch.testing.assert_close(value, average[name])

    def test_the_teacher_gathers_statistics_of_its_own(self):
        method = self.make().train()
        before = copy.deepcopy(method.teacher.model.network.encoder[1].running_mean)
        method(batch())
        after = method.teacher.model.network.encoder[1].running_mean
        assert not torch.equal(before, after)
        assert not torch.equal(after, method.student.network.encoder[1].running_mean)
        method.after_step(batch())
        assert torch.equal(after, method.teacher.model.network.encoder[1].running_mean)

    def test_what_strong_augmentation_blanks_does_not_count(self):
        def strong(images, masks, where):
            images, masks = images.clone(), masks.clone()
            images[:, :, :4], masks[:, :4] = 0.7, 255
            return images, masks

        method, other = (MeanTeacher(Plain(), strong=strong) for _ in range(2))
        for each in (method, other):
            each.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed=1).state_dict().items()})
        one = batch()
        elsewhere = one.unlabeled.clone()
        elsewhere[:, :, :3] = torch.rand(2, 3, 3, 8)  # one row off the border, which convolutions see
        assert torch.equal(
            method(one).logged["consistency"], other(one._replace(unlabeled=elsewhere)).logged["consistency"]
        )

    @pytest.mark.parametrize("deploy", ["teacher", "student"])
    def test_deploys_what_is_asked_for(self, deploy):
        method = MeanTeacher(Plain(), deploy=deploy)
        assert method.model is (method.student if deploy == "student" else method.teacher.model)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"space": "probabilities"}, "space is 'probabilities'; expected 'softmax' or 'logits'"),
            ({"deploy": "both"}, "deploy is 'both'; expected 'teacher' or 'student'"),
            ({"weight": -1}, "weight is -1; expected 0 or more"),
        ],
    )
    def test_refuses_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            MeanTeacher(Plain(), **options)
