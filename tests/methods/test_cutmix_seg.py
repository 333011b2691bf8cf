from __future__ import annotations

import copy

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen
from torch import nn

from stseg import ClassMix, Segmenter
from stseg.methods import CutMixSeg
from stseg.models.state import cpu_state


class FixedMask:
    """Pastes the same pixels of the next image into each."""

    def __init__(self, size=8):
        self.where = torch.zeros(size, size, dtype=torch.bool)
        self.where[2:6, 1:7] = True

    def __call__(self, *tensors):
        return tuple(torch.where(self.where, x.roll(-1, 0), x) for x in tensors)


def with_other_teacher(method, seed=1):
    method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed).state_dict().items()})
    return method


def of_teacher(images, seed=1):
    from stseg import Segmenter

    with torch.no_grad():
        return Segmenter(Plain(seed))(images).numpy()


class TestCutMixSeg(MethodTester):
    def make(self):
        return CutMixSeg(Network(), threshold=0.4)

    def plain(self):
        return with_other_teacher(CutMixSeg(Plain(), threshold=0.4, mix=None))

    @pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("rows", [2, 3])
    def test_loss_is_the_formula(self, threshold, rows):
        mix, one = FixedMask(), batch(rows)
        method = with_other_teacher(CutMixSeg(Plain(), threshold=threshold, weight=0.7, mix=mix))
        mixed, valid = one.unlabeled.numpy().copy(), one.valid.numpy().copy()
        teacher, plain = of_teacher(one.unlabeled), one.unlabeled.numpy()
        soft = np.stack([[naive.softmax(z[:, i, j]) for i, j in np.ndindex(8, 8)] for z in teacher])
        soft = soft.transpose(0, 2, 1).reshape(rows, 3, 8, 8)
        target = soft.copy()
        for b in range(rows):
            partner = (b + 1) % rows
            for i, j in np.ndindex(8, 8):
                if mix.where[i, j]:
                    mixed[b, :, i, j] = plain[partner, :, i, j]
                    valid[b, i, j] = one.valid[partner, i, j]
                    target[b, :, i, j] = soft[partner, :, i, j]
        with torch.no_grad():
            student = method.student(torch.from_numpy(mixed)).numpy()
            supervised = naive.supervised(method.student(one.images).numpy(), one.masks.numpy())
        total = confident = count = 0
        for b, i, j in np.ndindex(rows, 8, 8):
            if valid[b, i, j]:
                count += 1
                confident += target[b, :, i, j].max() >= threshold
                total += ((naive.softmax(student[b, :, i, j]) - target[b, :, i, j]) ** 2).sum()
        losses = method(one)
        assert 0 < confident < count or threshold != 0.4
        assert float(losses.logged["consistency"]) == pytest.approx(total / count, rel=1e-5)
        assert float(losses.logged["sure"]) == pytest.approx(confident / count)
        expected = supervised + 0.7 * (confident / count) * (total / count)
        assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-5)

    def test_without_a_confident_pixel_only_the_labels_teach(self):
        gradients = []
        for weight in (0.0, 1.0):
            method = with_other_teacher(CutMixSeg(Plain(), threshold=1.0, weight=weight))
            losses = method(batch())
            losses.total.backward()
            gradients.append(method.student.network.head.weight.grad)
        assert losses.logged["sure"] == 0
        assert losses.logged["consistency"] > 0
        torch.testing.assert_close(*gradients)

    def test_equal_networks_without_mixing_agree(self):
        assert float(CutMixSeg(Plain(), threshold=0.0, mix=None)(batch()).logged["consistency"]) == 0

    def test_the_teacher_gets_no_gradient_and_the_student_does(self):
        method = self.make().train()
        method(batch()).total.backward()
        assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())
        assert all(p.grad.abs().sum() > 0 for p in method.student.network.head.parameters())

    def test_the_consistency_reaches_the_student(self):
        method = with_other_teacher(CutMixSeg(Plain(), threshold=0.0))
        one = batch()
        method(one._replace(masks=torch.full_like(one.masks, 255))).total.backward()
        assert method.student.network.encoder.weight.grad.abs().sum() > 0

    def test_weights_and_statistics_of_the_teacher_are_averages_from_the_start(self):
        method = CutMixSeg(Network(), decay=0.8)
        average = cpu_state(method.teacher.model)
        for step in range(3):
            for value in method.student.state_dict().values():
                value.add_(torch.rand_like(value)) if value.is_floating_point() else value.add_(1)
            method.after_step(batch(step=step))
            student = cpu_state(method.student)
            for name, value in cpu_state(method.teacher.model).items():
                if value.is_floating_point():
                    average[name] = 0.8 * average[name] + 0.2 * student[name]
                    torch.testing.assert_close(value, average[name])
                else:
                    assert torch.equal(value, student[name])

    def test_the_teacher_predicts_in_evaluation_mode_and_stays_in_its_own(self):
        method = self.make().train()
        before = copy.deepcopy(method.teacher.state_dict())
        seen = rows_seen(method.teacher.model.network.encoder)
        method(batch())
        assert seen == []  # in training mode
        assert method.teacher.model.network.encoder[1].training
        assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())

    def test_labeled_and_mixed_images_have_batch_statistics_of_their_own(self):
        method = self.make().train()
        seen = rows_seen(method.student.network.encoder)
        method(batch(3))
        assert seen == [3, 3]

    def test_what_strong_augmentation_blanks_does_not_count(self):
        def strong(images, masks, where):
            images, masks = images.clone(), masks.clone()
            images[:, :, :4], masks[:, :4] = 0.7, 255
            return images, masks

        losses = with_other_teacher(CutMixSeg(Plain(), threshold=0.0, mix=None, strong=strong))(batch())
        assert losses.logged["sure"] == 1
        all_blank = lambda images, masks, where: (images, torch.full_like(masks, 255))  # noqa: E731
        losses = with_other_teacher(CutMixSeg(Plain(), threshold=0.0, mix=None, strong=all_blank))(batch())
        assert losses.logged["sure"] == losses.logged["consistency"] == 0

    @pytest.mark.parametrize("deploy", ["teacher", "student"])
    def test_deploys_what_is_asked_for(self, deploy):
        method = CutMixSeg(Plain(), deploy=deploy)
        assert method.model is (method.student if deploy == "student" else method.teacher.model)

    def test_deploys_the_teacher(self):
        method = CutMixSeg(nn.Conv2d(3, 2, 1))
        assert method.model is method.teacher.model

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.5}, "threshold is 1.5; expected a probability"),
            ({"deploy": "both"}, "deploy is 'both'; expected 'teacher' or 'student'"),
            ({"weight": -1}, "weight is -1; expected 0 or more"),
            ({"decay": 2}, "decay is 2; expected a number from 0 to 1"),
        ],
    )
    def test_refuses_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            CutMixSeg(Plain(), **options)


def test_mixes_by_classes_too():
    """The halves of an image are two classes; one, pasted into the mirrored image, makes all of it that class."""
    half = torch.cat([torch.zeros(3, 8, 4), torch.ones(3, 8, 4)], 2)
    one, seen = batch(2, 8)._replace(unlabeled=torch.stack([half, half.flip(2)]), valid=None), []
    network = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        network.weight.zero_()[1] = 1.0  # class 1 where the image is 1
        network.bias.copy_(torch.tensor([0.5, 0.0, -9.0]))
    method = CutMixSeg(Segmenter(network, mean=None, std=None), mix=ClassMix(), threshold=0.0)
    method.student.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method(one)
    assert all(len(set(row)) == 1 for row in seen[-1].flatten(0, 2).tolist())
