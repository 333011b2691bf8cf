from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch

import stseg
from stseg.methods import U2PL, u2pl
from stseg.methods.u2pl import draw, some


def first_ones(where: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a random draw: the columns in order, over and over."""
    columns = [row.nonzero()[:, 0] if row.any() else torch.zeros(1, dtype=torch.int64) for row in where]
    return torch.stack([row[torch.arange(count) % len(row)] for row in columns]), where.any(1)


def the_first(where: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without replacement, of one column."""
    assert count == 1
    columns, found = first_ones(where, 1)
    return columns, found[:, None]


def entropies(logits: np.ndarray) -> np.ndarray:
    found = np.zeros((len(logits), *logits.shape[2:]))
    for b, i, j in np.ndindex(*found.shape):
        p = naive.softmax(logits[b, :, i, j].astype(np.float64))
        found[b, i, j] = -(p * np.log(p)).sum()
    return found


class TestU2PL(MethodTester):
    def make(self):
        torch.manual_seed(5)
        options = {"anchors": 8, "negatives": 4, "keys": 4, "memory": 10, "start": 0.3, "ranks": (1, 3)}
        return U2PL(Network(), num_classes=CLASSES, channels=8, width=6, **options)

    def plain(self, **changes):
        torch.manual_seed(5)
        options = {"anchors": 8, "negatives": 4, "keys": 4, "memory": 10, "start": 0.3, "contrast": 0.0, "mix": None}
        given = {"channels": 6, "features": "encoder", "width": 5, "dropout": 0.0, "ranks": (1, 3)}
        return U2PL(Plain(), num_classes=CLASSES, **{**options, **given, **changes})

    @pytest.mark.parametrize(("step", "unreliable"), [(0, 0.5), (2, 0.5), (4, 0.5), (4, 0.0), (4, 1.0)])
    def test_loss_is_the_formula(self, step, unreliable):
        method, one = self.plain(semi=0.7, unreliable=unreliable), batch(step=step, steps=6)
        with torch.no_grad():
            for parameter in method.teacher.model["model"].parameters():
                parameter.mul_(1.5)  # so that the two differ
            labeled, unlabeled = (method.student["model"](x).numpy() for x in (one.images, one.unlabeled))
            opinion = method.teacher.model["model"](one.unlabeled).numpy()
        label, _ = naive.targets(opinion)
        entropy, valid = entropies(opinion), one.valid.numpy()
        least = np.percentile(entropy[valid], 100 - 100 * unreliable * (1 - step / 6))
        reliable = valid & (entropy < least - 1e-9)
        assert (reliable.sum() == 0) == (unreliable * (1 - step / 6) == 1)
        semi = naive.supervised(unlabeled, np.where(reliable, label, 255)) * valid.sum() / max(1, reliable.sum())
        supervised = naive.supervised(labeled, one.masks.numpy())
        losses = method(one)
        parts = {"supervised": supervised, "semi": semi, "reliable": reliable.sum() / valid.sum()}
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        total = supervised + (0.7 * semi if step >= 2 else 0)
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_contrast_is_the_formula(self, monkeypatch):
        """With a memory of one vector, and a draw that is not random."""
        monkeypatch.setattr(u2pl, "draw", first_ones)
        monkeypatch.setattr(u2pl, "some", the_first)
        method = self.plain(anchors=40, negatives=3, keys=1, memory=1, contrast=0.6, semi=0.0, unreliable=0.9)
        one = batch(step=3, steps=6, seed=3)
        with torch.no_grad():
            for parameter in method.teacher.parameters():
                parameter.mul_(1.5)
            images = torch.cat([one.images, one.unlabeled])
            views = []
            for networks in (method.student, method.teacher.model):
                model = networks["model"]
                encoded = model.network.encoder((images - model._mean[:, None, None]) / model._std[:, None, None])
                views.append((model(images).numpy(), networks["head"].train()(encoded).double().numpy()))
        (_, mine), (opinion, theirs) = views
        entropy, valid = entropies(opinion[2:]), one.valid.numpy()
        low, high = np.percentile(entropy[valid], 45), np.percentile(entropy[valid], 55)
        classes, known = np.concatenate([one.masks.numpy(), opinion[2:].argmax(1)]), one.masks.numpy() != 255
        certain = np.concatenate([known, valid & (entropy <= low)])
        uncertain = np.concatenate([known, valid & (entropy >= high)])
        losses = []
        for c in range(CLASSES):
            anchors, center, negative = [], [], None
            for b, i, j in np.ndindex(*classes.shape):
                p = naive.softmax(opinion[b, :, i, j].astype(np.float64))
                rank = int((p > p[c]).sum())
                if classes[b, i, j] == c and certain[b, i, j]:
                    center.append(theirs[b, :, i, j])
                    if p[c] > 0.3:
                        anchors.append(mine[b, :, i, j])
                likely_wrong = rank >= 1 if b >= 2 else (rank < 1 and classes[b, i, j] != c)
                if uncertain[b, i, j] and likely_wrong and negative is None:
                    negative = theirs[b, :, i, j]
            if not anchors or negative is None:
                continue

            def cosine(a, b):
                return a @ b / np.sqrt((a @ a) * (b @ b))

            terms = []
            for number in range(40):
                a = anchors[number % len(anchors)]
                own = math.exp(cosine(a, np.mean(center, 0)) / 0.5)
                terms.append(-math.log(own / (own + 3 * math.exp(cosine(a, negative) / 0.5))))
            losses.append(sum(terms) / 40)
        assert len(losses) >= 2
        result = method(one)
        assert float(result.logged["contrast"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        total = float(result.logged["supervised"]) + 0.6 * sum(losses) / len(losses)
        assert float(result.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_the_last_layer_and_the_teacher_do_not_learn_from_the_contrast(self):
        method = self.plain(contrast=1.0, semi=0.0)
        one = batch(step=3, seed=3)
        one = one._replace(masks=torch.where(one.masks == 255, 1, one.masks))
        losses = method(one)
        assert losses.logged["contrast"] > 0
        losses.total.backward()
        assert method.student["head"][0].weight.grad.any()
        assert all(p.grad is None for p in method.teacher.parameters())
        network = method.student["model"].network
        alone = Plain()
        logits = stseg.Segmenter(alone)(one.images)
        torch.nn.functional.cross_entropy(logits, one.masks, ignore_index=255).backward()
        torch.testing.assert_close(network.head.weight.grad, alone.head.weight.grad)
        assert not torch.allclose(network.encoder.weight.grad, alone.encoder.weight.grad)

    def test_the_share_of_reliable_pixels_grows_to_the_end(self):
        """80 % of the first epoch, 99.75 % of the last of 80."""
        method, one = self.plain(start=0.0), batch(4, 32)
        shares = {s: float(method(one._replace(step=s, steps=80)).logged["reliable"]) for s in (0, 1, 40, 79)}
        assert shares == pytest.approx({0: 0.8, 1: 0.8025, 40: 0.9, 79: 0.9975}, abs=1e-3)

    def test_the_teacher_is_the_student_until_the_end_of_the_supervised_part(self):
        method = self.plain(start=0.5)
        head = method.student["model"].network.head
        seen = []
        for step in range(6):
            with torch.no_grad():
                head.bias.fill_(float(step))
            method.after_step(batch(step=step, steps=6))
            seen.append(method.teacher.model["model"].network.head.bias[0].item())
        assert seen == [0.0, 1.0, 2.0, 3.0, 3.5, pytest.approx(4.0)]  # decays 0, in the second half 0, 1/2, 2/3

    def test_the_supervised_part_leaves_the_memory_empty(self):
        method = self.plain(start=0.5)
        method(batch(step=2))
        assert all((ring.labels == -1).all() for ring in method.memory)
        method(batch(step=3))
        assert any((ring.labels == number).any() for number, ring in enumerate(method.memory))

    def test_labels_are_those_of_the_teacher_in_evaluation_mode_and_features_of_training(self):
        method, modes = self.make().train(), []
        network = method.teacher.model["model"].network
        network.register_forward_pre_hook(lambda module, inputs: modes.append((module.training, len(inputs[0]))))
        torch.manual_seed(0)
        method(batch(2, 16))
        assert modes[-2:] == [(False, 2), (True, 4)]

    def test_deploys_what_is_asked_for(self):
        for deploy in ("teacher", "student"):
            method = self.plain(deploy=deploy)
            assert (method.model is method.student["model"]) == (deploy == "student")

    @pytest.mark.parametrize(
        ("network", "channels"),
        [
            (lambda: smp.Unet("resnet18", encoder_weights=None, classes=3), 16),
            (lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3), 256),
            (lambda: stseg.models.DeepLabV3Plus("resnet18", num_classes=3), 256),
        ],
    )
    def test_takes_the_networks_of_others_at_any_size(self, network, channels):
        options = {"anchors": 8, "negatives": 4, "keys": 4, "memory": 10, "start": 0.0, "ranks": (1, 3)}
        method = U2PL(network(), num_classes=3, channels=channels, width=8, **options)
        losses = method(batch(2, 41))
        losses.total.backward()
        assert all(value.isfinite() for value in losses.logged.values())

    def test_names_other_classes(self):
        with pytest.raises(ValueError, match="num_classes is 4, but the network gives 3"):
            U2PL(Plain(), num_classes=4, channels=6, features="encoder", memory=10)(batch())

    @pytest.mark.parametrize(
        "settings",
        [
            {"start": 2},
            {"unreliable": -1},
            {"confident": 3},
            {"semi": -1},
            {"contrast": -1},
            {"temperature": 0},
            {"anchors": 0},
            {"memory": 0},
            {"dropout": 2},
            {"ranks": (3, 3)},
            {"deploy": "both"},
        ],
    )
    def test_checks_its_settings(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            U2PL(Plain(), num_classes=CLASSES, channels=6, **settings)


class TestDraw:
    def test_draws_all_that_count_alike_and_nothing_else(self):
        torch.manual_seed(0)
        where = torch.tensor([[False, True, True, False, True], [False] * 5, [True, False, False, False, False]])
        columns, found = draw(where, 6000)
        assert found.tolist() == [True, False, True]
        counts = columns[0].bincount(minlength=5)
        assert counts[[0, 3]].tolist() == [0, 0]
        assert (counts[[1, 2, 4]] - 2000).abs().max() < 200
        assert not columns[2].any()
        assert ((columns[1] >= 0) & (columns[1] < 5)).all()


class TestSome:
    def test_draws_each_that_counts_alike_and_none_twice(self):
        torch.manual_seed(0)
        where = torch.tensor([[False, True, True, False, True], [False] * 5, [True, False, False, False, False]])
        counts = torch.zeros(5)
        for _ in range(600):
            columns, found = some(where, 2)
            assert found.tolist() == [[True, True], [False, False], [True, False]]
            assert columns[0, 0] != columns[0, 1]
            assert columns[2, 0] == 0
            counts += columns[0].bincount(minlength=5)
        assert counts[[0, 3]].tolist() == [0, 0]
        assert (counts[[1, 2, 4]] - 400).abs().max() < 60

    def test_there_may_be_fewer_columns(self):
        columns, found = some(torch.tensor([[False, True]]), 5)
        assert columns.shape == found.shape == (1, 2)
        assert found.tolist() == [[True, False]]


class TestMemory:
    def test_a_class_that_few_pixels_are_not_is_not_repeated(self):
        """In each step, each negative enters the memory once."""
        method = TestU2PL().plain(keys=1000, memory=1000, start=0.0)
        method(batch(step=3, seed=3))
        for ring in method.memory:
            kept = ring.vectors[ring.labels >= 0]
            assert 0 < len(kept) < 1000
            assert len(kept.unique(dim=0)) == len(kept)
