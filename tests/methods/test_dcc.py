from __future__ import annotations

import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import tester
import torch
from naive import softmax, supervised
from tester import MethodTester, Network, Plain

import stseg
from stseg import Batch
from stseg.augment import CropPair
from stseg.methods import DCC
from stseg.methods.dcc import overlapping

STRIDE = 4
PAIRS = CropPair(16, base_size=20, scale=(0.9, 1.6), stride=STRIDE)
plain_batch = tester.batch


def pair_batch(rows: int = 2, size: int = 8, *, seed: int = 0, **options) -> Batch:
    """The unlabeled images of a batch as pairs of crops."""
    one = plain_batch(rows, size, seed=seed, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        crops = [PAIRS(image) for image in torch.rand(rows, 3, 24, 20)]
    unlabeled = {name: torch.stack([each[name] for each in crops]) for name in crops[0]}
    unlabeled["valid"][-1, 1, :, -3:] = False
    return one._replace(unlabeled=unlabeled, valid=None)


def features_of(method: DCC, crops: dict[str, torch.Tensor], index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, logits and validity of each cell of one of the crops, not flipped."""
    network = method.model.network
    images, valid = crops["images"][:, index], crops["valid"][:, index].numpy()
    with torch.no_grad():
        encoded = network.encoder((images - method.model._mean[:, None, None]) / method.model._std[:, None, None])
        logits = method.model(images).numpy()
    rows, cells = len(images), images.shape[-1] // STRIDE
    projected = np.zeros((rows, cells, cells, method.memory.vectors.shape[1]))
    mean_logits, whole = np.zeros((rows, cells, cells, logits.shape[1])), np.zeros((rows, cells, cells), dtype=bool)
    for b, i, j in np.ndindex(rows, cells, cells):
        cell = (b, slice(None), slice(STRIDE * i, STRIDE * i + STRIDE), slice(STRIDE * j, STRIDE * j + STRIDE))
        with torch.no_grad():
            vector = method.projector(encoded[cell].mean((1, 2))[None, :, None, None])[0, :, 0, 0].double().numpy()
        at = (b, i, cells - 1 - j if crops["flipped"][b, index] else j)
        projected[at] = vector / np.sqrt((vector**2).sum())
        mean_logits[at] = logits[cell].mean((1, 2))
        whole[at] = valid[cell[0], cell[2], cell[3]].all()
    return projected, mean_logits, whole


class TestDCC(MethodTester):
    @pytest.fixture(autouse=True)
    def _pairs(self, monkeypatch):
        monkeypatch.setattr(tester, "batch", pair_batch)

    def make(self):
        torch.manual_seed(5)
        return DCC(Network(), channels=8, width=6, pairs=PAIRS, threshold=0.35, start=0.5, memory=64, temperature=0.2)

    def plain(self):
        torch.manual_seed(5)
        options = {"pairs": PAIRS, "threshold": 0.35, "start": 0.5, "memory": 64, "temperature": 0.2}
        return DCC(Plain(), channels=6, width=5, features="encoder", strong=None, **options)

    def test_ignores_what_is_not_valid(self):
        method = self.plain().train()
        nothing = pair_batch()
        nothing.unlabeled["valid"][:] = False
        other = nothing._replace(unlabeled={**nothing.unlabeled, "images": torch.rand(2, 2, 3, 16, 16)})
        losses = [method(each).total for each in (nothing, other)]
        assert torch.equal(*losses)
        assert (method.memory.labels == -1).all()
        losses[0].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())

    @pytest.mark.parametrize(("step", "threshold"), [(2, 0.35), (3, 0.35), (3, 0.0), (3, 1.0)])
    def test_loss_is_the_formula(self, step, threshold):
        method = self.plain()
        method.threshold, method.weight = threshold, 0.3
        first, one = pair_batch(step=step, seed=1), pair_batch(step=step, seed=2)
        assert one.unlabeled["offset"].any()
        assert one.unlabeled["flipped"].any()
        method(first)  # whose features are in the memory
        vectors, classes = [], []
        seen = [features_of(method, one.unlabeled, index) for index in range(2)]
        for each in (*(features_of(method, first.unlabeled, index) for index in range(2)), *seen):
            for b, i, j in np.ndindex(*each[2].shape):
                if each[2][b, i, j]:
                    vectors.append(each[0][b, i, j])
                    classes.append(each[1][b, i, j].argmax())
        losses: dict[str, list[float]] = {"ab": [], "ba": []}
        places = 0
        for b, i, j in np.ndindex(*seen[0][2].shape):
            y, x = i - int(one.unlabeled["offset"][b, 0]) // STRIDE, j - int(one.unlabeled["offset"][b, 1]) // STRIDE
            if not (0 <= y < 4 and 0 <= x < 4) or not (seen[0][2][b, i, j] and seen[1][2][b, y, x]):
                continue
            places += 1
            pair = {"a": (seen[0], (b, i, j)), "b": (seen[1], (b, y, x))}
            for direction, found in losses.items():
                (mine, at), (theirs, there) = pair[direction[0]], pair[direction[1]]
                confidence, other = softmax(mine[1][at]).max(), softmax(theirs[1][there]).max()
                if other > threshold and confidence < other:
                    own = math.exp(mine[0][at] @ theirs[0][there] / 0.2)
                    others = sum(
                        math.exp(mine[0][at] @ vector / 0.2)
                        for vector, label in zip(vectors, classes, strict=True)
                        if label != mine[1][at].argmax()
                    )
                    found.append(-math.log(own / (own + others)))
        contrast = sum(sum(found) / max(1, len(found)) for found in losses.values())
        assert (contrast == 0) == (threshold == 1)
        result = method(one)
        assert float(result.logged["contrast"]) == pytest.approx(contrast, rel=1e-4)
        learning = sum(len(found) for found in losses.values())
        assert float(result.logged["directed"]) == pytest.approx(learning / places)
        with torch.no_grad():
            labeled = supervised(method.model(one.images).numpy(), one.masks.numpy())
        total = labeled + (0.3 * contrast if step >= 3 else 0)
        assert float(result.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_the_last_layer_does_not_learn_from_the_contrast(self):
        method = self.plain()
        one = pair_batch(seed=2)
        losses = method(one._replace(masks=torch.full_like(one.masks, 255)))
        assert losses.logged["contrast"] > 0
        losses.total.backward()
        network = method.model.network
        assert not network.head.weight.grad.any()
        assert network.encoder.weight.grad.any()
        assert all(p.grad.any() for p in method.projector.parameters())

    def test_with_equal_confidences_neither_side_learns(self):
        method, one = self.plain(), pair_batch()
        images = one.unlabeled["images"][:, :1].expand(-1, 2, -1, -1, -1)
        same = {
            "images": images,
            "valid": torch.ones(2, 2, 16, 16, dtype=torch.bool),
            "offset": torch.zeros(2, 2, dtype=torch.int64),
            "flipped": torch.zeros(2, 2, dtype=torch.bool),
        }
        logged = method(one._replace(unlabeled=same)).logged
        assert logged["contrast"] == logged["directed"] == 0

    def test_the_ignore_index_may_be_0(self):
        method, one = self.plain(), pair_batch(seed=2)
        expected = method(one).logged
        method.memory.labels.fill_(-1)
        known = one._replace(masks=one.masks.masked_fill(one.masks == 255, 0), ignore_index=0)
        logged = method(known).logged
        assert all(torch.equal(logged[name], expected[name]) for name in ("contrast", "directed"))

    @pytest.mark.parametrize("stride", [1, 5])
    def test_two_crops_of_one_image_have_the_same_features_where_they_overlap(self, stride):
        """Flips and offsets are undone: without surroundings (a 1x1 convolution) partners are alike.

        Also if the crops of 16 are padded to 20 for the network.
        """
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), torch.nn.Conv2d(6, 3, 1))
        network = stseg.Segmenter(layers, stride=stride)
        method = DCC(network, channels=6, features="0", pairs=PAIRS, strong=None, memory=0)
        one = pair_batch(3, seed=3)
        offset = one.unlabeled["offset"]
        assert one.unlabeled["flipped"].any()
        assert offset.any()
        first, second = (method._cells(one.unlabeled, index, 255) for index in range(2))
        partner, inside = overlapping(offset // STRIDE, first.valid.shape[1:])
        both = inside & first.valid.flatten() & second.valid.flatten()[partner]
        assert both.sum() > 5
        a, b = (cells.features.flatten(0, 2) for cells in (first, second))
        torch.testing.assert_close(a[both], b[partner][both])

    def test_keeps_the_features_of_the_last_steps(self):
        method = self.plain()
        for seed in range(3):
            method(pair_batch(seed=seed))
        before = method.memory.vectors.clone()
        method(pair_batch(seed=2))
        assert torch.equal(before, method.memory.vectors)  # the same step again
        assert not before.requires_grad
        torch.testing.assert_close(before.norm(dim=1), torch.ones(64))

    def test_the_projector_has_as_many_parameters_as_the_authors(self):
        assert sum(p.numel() for p in DCC(Plain()).projector.parameters()) == 98_688

    @pytest.mark.parametrize(
        "network",
        [
            lambda: smp.Unet("resnet18", encoder_weights=None, classes=3),
            lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3),
            lambda: stseg.models.DeepLabV3Plus("resnet18", num_classes=3),
        ],
    )
    def test_takes_the_networks_of_others(self, network):
        channels = 16 if "Unet" in repr(network()).split("(")[0] else 256
        method = DCC(network(), channels=channels, pairs=CropPair(32, base_size=40), memory=0, threshold=0.0)
        crops = [method.pairs(torch.rand(3, 40, 40)) for _ in range(2)]
        unlabeled = {name: torch.stack([each[name] for each in crops]) for name in crops[0]}
        losses = method(plain_batch(2, 32)._replace(unlabeled=unlabeled, valid=None))
        losses.total.backward()
        assert all(value.isfinite() for value in losses.logged.values())
        assert losses.logged["directed"] > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"channels": 7}, "map of shape .*map of 7 channels"),
            ({"features": "nowhere"}, "no submodule 'nowhere'.*encoder"),
            ({"features": None}, "no decoder"),
        ],
    )
    def test_says_what_is_wrong_with_the_features(self, options, message):
        method = DCC(Plain(), **{"channels": 6, "features": "encoder", "pairs": PAIRS, **options})
        with pytest.raises(stseg.NetworkError, match=message):
            method(pair_batch())

    def test_crops_that_the_network_pads_are_aligned_too(self):
        """Crops of 48 are padded to 64 by a network that takes multiples of 32."""
        pairs = CropPair(48, base_size=50, scale=(1.0, 2.0))
        network = smp.Unet("resnet18", encoder_weights=None, classes=3)
        method = DCC(network, channels=16, pairs=pairs, memory=0, strong=None)
        images = torch.rand(2, 2, 3, 48, 48)
        crops = {"images": images, "valid": torch.ones(2, 2, 48, 48, dtype=torch.bool)}
        cells = method._cells({**crops, "flipped": torch.zeros(2, 2, dtype=torch.bool)}, 0, 255)
        assert cells.features.shape == (2, 6, 6, 128)
        assert cells.classes.shape == cells.valid.shape == (2, 6, 6)

    @pytest.mark.parametrize(("stride", "crop"), [(16, 32), (3, 24)])
    def test_refuses_features_of_another_stride(self, stride, crop):
        encoder = torch.nn.Conv2d(3, 6, stride, stride=stride)
        network = torch.nn.Sequential(encoder, torch.nn.Conv2d(6, 3, 1))
        method = DCC(network, channels=6, features="0", pairs=CropPair(crop, base_size=crop), strong=None)
        one = {"images": torch.rand(2, 2, 3, crop, crop), "valid": torch.ones(2, 2, crop, crop, dtype=torch.bool)}
        with pytest.raises(stseg.NetworkError, match=f"for crops of {crop} x {crop}; expected a stride that divides"):
            method._cells({**one, "flipped": torch.zeros(2, 2, dtype=torch.bool)}, 0, 255)

    @pytest.mark.parametrize(
        "settings", [{"weight": -1}, {"threshold": 1.5}, {"temperature": 0}, {"start": 2}, {"memory": -1}]
    )
    def test_checks_its_settings(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DCC(Plain(), channels=6, **settings)
