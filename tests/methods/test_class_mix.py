from __future__ import annotations

import copy

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen

from stseg import Segmenter
from stseg.augment import ClassMix as MixClasses
from stseg.methods import ClassMix
from stseg.models.state import cpu_state


class LowestClass(MixClasses):
    """Chooses the lowest class of each image with two or more."""

    def draw(self, labels, generator=None, *, num_classes=None, ignore_index=None):
        known = labels.masked_fill(labels == ignore_index, num_classes).flatten(1)
        lowest, highest = known.amin(1), known.masked_fill(known == num_classes, -1).amax(1)
        return (labels == lowest[:, None, None]) & (lowest < highest)[:, None, None]


def with_other_teacher(method, seed=1):
    method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed).state_dict().items()})
    return method


class TestClassMix(MethodTester):
    def make(self):
        return ClassMix(Network(), threshold=0.4)

    def plain(self):
        return with_other_teacher(ClassMix(Plain(), threshold=0.4, mix=None))

    @pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("rows", [2, 3])
    def test_loss_is_the_formula(self, threshold, rows):
        method = with_other_teacher(ClassMix(Plain(), threshold=threshold, weight=0.7, mix=LowestClass()))
        one = batch(rows)
        with torch.no_grad():
            label, confidence = naive.targets(Segmenter(Plain(1))(one.unlabeled).numpy())
        valid, plain = one.valid.numpy(), one.unlabeled.numpy()
        mixed, labels, sure, seen = plain.copy(), label.copy(), confidence.copy(), valid.copy()
        for b in range(rows):
            classes = sorted(set(label[b][valid[b]].tolist()))
            assert len(classes) > 1
            for i, j in np.ndindex(8, 8):
                own = valid[b, i, j] and label[b, i, j] == classes[0]
                source = b if own else (b + 1) % rows
                mixed[b, :, i, j] = plain[source, :, i, j]
                labels[b, i, j], sure[b, i, j] = label[source, i, j], confidence[source, i, j]
                seen[b, i, j] = valid[source, i, j]
        with torch.no_grad():
            supervised = naive.supervised(method.student(one.images).numpy(), one.masks.numpy())
            student = method.student(torch.from_numpy(mixed)).numpy()
        consistency = naive.supervised(student, np.where(seen, labels, 255))
        share = (sure[seen] >= threshold).mean()
        assert 0 < share < 1 or threshold != 0.4
        losses = method(one)
        assert float(losses.logged["consistency"]) == pytest.approx(consistency, rel=1e-5)
        assert float(losses.logged["sure"]) == pytest.approx(share)
        assert float(losses.total.detach()) == pytest.approx(supervised + 0.7 * share * consistency, rel=1e-5)

    def test_without_a_confident_pixel_only_the_labels_teach(self):
        gradients = []
        for weight in (0.0, 1.0):
            method = with_other_teacher(ClassMix(Plain(), threshold=1.0, weight=weight))
            losses = method(batch())
            losses.total.backward()
            gradients.append(method.student.network.head.weight.grad)
        assert losses.logged["sure"] == 0
        torch.testing.assert_close(*gradients)

    def test_the_teacher_gets_no_gradient_and_the_student_does(self):
        method = ClassMix(Network(), threshold=0.0).train()
        one = batch()
        method(one._replace(masks=torch.full_like(one.masks, 255))).total.backward()
        assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())
        assert method.student.network.encoder[0].weight.grad.abs().sum() > 0

    def test_the_teacher_gathers_statistics_of_its_own(self):
        method = self.make().train()
        before = copy.deepcopy(method.teacher.model.network.encoder[1].running_mean)
        method(batch())
        after = method.teacher.model.network.encoder[1].running_mean.clone()
        assert not torch.equal(before, after)
        method.after_step(batch())
        assert torch.equal(after, method.teacher.model.network.encoder[1].running_mean)

    def test_the_average_starts_as_the_student(self):
        method = with_other_teacher(ClassMix(Plain(), decay=0.6))
        average = cpu_state(method.teacher.model)
        for step, decay in enumerate([0.0, 0.5, 0.6, 0.6]):
            for p in method.student.parameters():
                p.data.add_(torch.rand_like(p))
            method.after_step(batch(step=step))
            average = {name: decay * average[name] + (1 - decay) * v for name, v in cpu_state(method.student).items()}
            for name, value in cpu_state(method.teacher.model).items():
                torch.testing.assert_close(value, average[name])

    def test_labeled_and_mixed_images_have_batch_statistics_of_their_own(self):
        method = self.make().train()
        seen = rows_seen(method.student.network.encoder)
        method(batch(3))
        assert seen == [3, 3]

    def test_mixed_images_are_augmented_after_they_are_mixed(self):
        seen = []

        def strong(images, masks, where):
            seen.append((images, masks))
            return images, torch.full_like(masks, 255)

        one = batch()
        method = with_other_teacher(ClassMix(Plain(), threshold=0.0, mix=LowestClass(), strong=strong))
        losses = method(one)
        assert not torch.equal(seen[0][0], one.unlabeled)
        assert losses.logged["consistency"] == losses.logged["sure"] == 0

    def test_classes_beyond_255_and_other_ignore_indices_are_mixed(self):
        method = ClassMix(Plain(classes=300), threshold=0.0)
        method.teacher.model.network.head.bias.data[255] = 50.0  # a class here, not the ignore index
        one = batch()
        masks = torch.where(one.masks == 255, -1, one.masks)
        assert method(one._replace(masks=masks, ignore_index=-1)).total.isfinite()

    @pytest.mark.parametrize("deploy", ["teacher", "student"])
    def test_deploys_what_is_asked_for(self, deploy):
        method = ClassMix(Plain(), deploy=deploy)
        assert method.model is (method.student if deploy == "student" else method.teacher.model)

    def test_deploys_the_student(self):
        method = ClassMix(Plain())
        assert method.model is method.student

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": -0.5}, "threshold is -0.5; expected a probability"),
            ({"deploy": "both"}, "deploy is 'both'; expected 'teacher' or 'student'"),
            ({"weight": -1}, "weight is -1; expected 0 or more"),
        ],
    )
    def test_refuses_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            ClassMix(Plain(), **options)
