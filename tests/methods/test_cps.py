from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen

from stseg import TrainConfig
from stseg.augment import BoxMix
from stseg.engine.optimizers import parameter_groups
from stseg.methods import CPS


class TestCPS(MethodTester):
    def make(self):
        return CPS(Network(0), Network(1))

    def plain(self):
        return CPS(Plain(0), Plain(1))

    @pytest.mark.parametrize("weight", [0.0, 1.5, 6.0])
    def test_loss_is_the_formula(self, weight):
        method, one = CPS(Plain(0), Plain(1), weight=weight), batch()
        with torch.no_grad():
            logits = [
                np.concatenate([network(one.images).numpy(), network(one.unlabeled).numpy()])
                for network in (method.model, method.other)
            ]
        valid = np.concatenate([np.ones_like(one.valid.numpy()), one.valid.numpy()])
        supervised = sum(naive.supervised(z[:2], one.masks.numpy()) for z in logits)
        labels = [naive.targets(z)[0] for z in logits]
        sure = np.ones_like(valid, dtype=float)
        cross = naive.consistency(logits[0], labels[1], sure, valid, 0) + naive.consistency(
            logits[1], labels[0], sure, valid, 0
        )
        losses = method(one)
        assert float(losses.logged["supervised"]) == pytest.approx(supervised, rel=1e-5)
        assert float(losses.logged["cross"]) == pytest.approx(cross, rel=1e-5)
        assert float(losses.total.detach()) == pytest.approx(supervised + weight * cross, rel=1e-5)

    def test_both_networks_learn_and_the_first_is_deployed(self):
        method = self.make().train()
        method(batch()).total.backward()
        assert all(p.grad.abs().sum() > 0 for p in (method.model.network.head.weight, method.other.network.head.weight))
        assert method.model.network is not method.other.network

    def test_labeled_and_unlabeled_images_have_batch_statistics_of_their_own(self):
        method = self.make().train()
        seen = rows_seen(method.model.network.encoder)
        method(batch(3))
        assert seen == [3, 3]

    def test_both_backbones_learn_at_the_base_rate(self):
        method = self.make()
        groups = parameter_groups(method, TrainConfig(steps=1, lr=0.1, head_lr_factor=10))
        names = {id(p): name for name, p in method.named_parameters()}
        base, head = ({names[id(p)] for p in group["params"]} for group in groups)
        assert all(".encoder." in name for name in base)
        assert {name.split(".")[0] for name in base} == {name.split(".")[0] for name in head} == {"model", "other"}
        assert (groups[0]["lr"], groups[1]["lr"]) == (0.1, 1.0)

    def test_one_network_twice_is_refused(self):
        network = Plain()
        with pytest.raises(ValueError, match="share parameters; expected two networks with weights of their own"):
            CPS(network, network)


class FixedBoxes(BoxMix):
    """Two boxes that overlap, for images of 8 x 8."""

    def draw(self, images, generator=None):
        return torch.tensor([[1, 1, 5, 5], [3, 3, 8, 8]]).expand(len(images), 2, 4)


class TestCPSWithCutMix(MethodTester):
    def make(self):
        return CPS(Network(0), Network(1), mix=BoxMix(area=(0.25, 0.5), boxes=3))

    def plain(self):
        return CPS(Plain(0), Plain(1), mix=lambda *tensors: tuple(x.clone() for x in tensors))

    @pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
    @pytest.mark.parametrize("rows", [2, 3])
    def test_loss_is_the_formula(self, weight, rows):
        method, one = CPS(Plain(0), Plain(1), weight=weight, mix=FixedBoxes()), batch(rows)
        with torch.no_grad():
            labeled = [network(one.images).numpy() for network in (method.model, method.other)]
            labels = [naive.targets(network(one.unlabeled).numpy())[0] for network in (method.model, method.other)]
        plain, valid = one.unlabeled.numpy(), one.valid.numpy()
        mixed, seen, wanted = plain.copy(), valid.copy(), [label.copy() for label in labels]
        for b, i, j in np.ndindex(rows, 8, 8):
            if (1 <= i < 5 and 1 <= j < 5) != (i >= 3 and j >= 3):
                source = (b + 1) % rows
                mixed[b, :, i, j], seen[b, i, j] = plain[source, :, i, j], valid[source, i, j]
                for label, original in zip(wanted, labels, strict=True):
                    label[b, i, j] = original[source, i, j]
        with torch.no_grad():
            logits = [network(torch.from_numpy(mixed)).numpy() for network in (method.model, method.other)]
        supervised = sum(naive.supervised(z, one.masks.numpy()) for z in labeled)
        cross = sum(
            naive.supervised(z, np.where(seen, label, 255)) for z, label in zip(logits, wanted[::-1], strict=True)
        )
        losses = method(one)
        assert float(losses.logged["supervised"]) == pytest.approx(supervised, rel=1e-5)
        assert float(losses.logged["cross"]) == pytest.approx(cross, rel=1e-5)
        assert float(losses.total.detach()) == pytest.approx(supervised + weight * cross, rel=1e-5)

    def test_labeled_unlabeled_and_mixed_images_have_batch_statistics_of_their_own(self):
        method = self.make().train()
        seen = [rows_seen(network.network.encoder) for network in (method.model, method.other)]
        method(batch(3)._replace(images=torch.rand(2, 3, 8, 8), masks=torch.zeros(2, 8, 8, dtype=torch.long)))
        assert seen == [[2, 3, 3], [2, 3, 3]]

    def test_both_networks_learn_from_the_mixed_images_alone(self):
        method = CPS(Plain(0), Plain(1), mix=FixedBoxes())
        method(batch()._replace(masks=torch.full((2, 8, 8), 255))).total.backward()
        assert all(network.network.encoder.weight.grad.abs().sum() > 0 for network in (method.model, method.other))

    def test_labeled_images_teach_by_their_masks_alone(self):
        method = CPS(Plain(0), Plain(1), mix=FixedBoxes())
        one = batch()
        other = one._replace(images=torch.rand(2, 3, 8, 8))
        assert torch.equal(method(one).logged["cross"], method(other).logged["cross"])

    def test_the_weight_is_that_of_the_authors(self):
        assert CPS(Plain(0), Plain(1)).weight == 1.5
        assert self.make().weight == 1.0
        assert CPS(Plain(0), Plain(1), mix=BoxMix(), weight=5).weight == 5
        with pytest.raises(ValueError, match="weight is -1; expected 0 or more"):
            CPS(Plain(0), Plain(1), weight=-1)
