from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch, rows_seen

from stseg import TrainConfig
from stseg.functional import turn
from stseg.methods import S4L
from stseg.methods.s4l import RotationHead


class TestS4L(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return S4L(Network(), num_classes=CLASSES)

    def plain(self):
        torch.manual_seed(5)
        return S4L(Plain(), num_classes=CLASSES, turned=0.0, rotation=0.0)

    def test_loss_is_the_formula(self):
        method, one = S4L(Plain(), num_classes=CLASSES, turned=0.3, rotation=0.7), batch()
        torch.manual_seed(4)
        quarters = torch.randint(1, 4, (4,)).numpy()
        unlabeled = one.unlabeled * one.valid[:, None]
        images = np.concatenate([one.images.numpy(), unlabeled.numpy()])
        copies = np.stack([np.rot90(image, -k, (1, 2)) for image, k in zip(images, quarters, strict=True)])
        with torch.no_grad():
            logits = method.model(torch.from_numpy(np.concatenate([images, copies])))
            scores = method.head(logits).numpy()
        masks = np.stack([np.rot90(mask, -k) for mask, k in zip(one.masks.numpy(), quarters[:2], strict=True)])
        supervised = naive.supervised(logits[:2].numpy(), one.masks.numpy())
        turned = naive.supervised(logits[4:6].numpy(), masks)
        targets = [0, 0, 0, 0, *quarters]
        rotation = sum(naive.cross_entropy(z, k) for z, k in zip(scores, targets, strict=True)) / 8
        torch.manual_seed(4)
        losses = method(one)
        for name, value in {"supervised": supervised, "turned": turned, "rotation": rotation}.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        assert float(losses.total.detach()) == pytest.approx(supervised + 0.3 * turned + 0.7 * rotation, rel=1e-4)

    def test_all_views_share_one_forward_pass(self):
        method = self.make().train()
        seen = rows_seen(method.model.network.encoder)
        method(batch(3)).total.backward()
        assert seen == [12]
        assert all(p.grad.abs().sum() > 0 for p in method.head.parameters() if p.ndim > 1)

    def test_the_head_learns_at_the_base_rate(self):
        method = self.make()
        network, head = method.optimizers(TrainConfig(steps=1, lr=0.1, head_lr_factor=10))
        assert {group["lr"] for group in network.param_groups} == {0.1, 1.0}
        assert {group["lr"] for group in head.param_groups if group["params"]} == {0.1}
        held = {id(p) for optimizer in (network, head) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.parameters()}

    def test_crops_that_are_not_square_are_refused(self):
        one = batch()
        wide = one._replace(images=one.images[..., :6], masks=one.masks[..., :6], unlabeled=one.unlabeled[..., :6])
        with pytest.raises(ValueError, match=r"expected square images, .* weak=stseg\.WeakAugment\(size\)"):
            S4L(Plain(), num_classes=CLASSES)(wide._replace(valid=None))

    def test_another_number_of_classes_is_refused(self):
        with pytest.raises(ValueError, match="num_classes is 5, but the network gives 3 classes"):
            S4L(Plain(), num_classes=5)(batch())

    @pytest.mark.parametrize("classes", [21])
    def test_the_head_has_as_many_parameters_as_in_pixelssl(self, classes):
        assert sum(p.numel() for p in RotationHead(classes).parameters()) == 21_529


def test_turns_are_those_of_numpy():
    tensor, quarters = torch.rand(5, 2, 6, 6), torch.tensor([0, 1, 2, 3, 5])
    expected = np.stack([np.rot90(x, -int(k), (1, 2)) for x, k in zip(tensor.numpy(), quarters, strict=True)])
    assert np.array_equal(turn(tensor, quarters).numpy(), expected)
    assert torch.equal(turn(turn(tensor, quarters), 4 - quarters % 4), tensor)
