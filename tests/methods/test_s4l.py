from __future__ import annotations

from collections import Counter

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch, rows_seen

from stseg import TrainConfig
from stseg.methods import S4L


class Fixed(S4L):
    """Turns in a fixed order, so that nothing is random."""

    order = (1, 3, 2)

    def draw(self, images):
        return torch.tensor([self.order[row % len(self.order)] for row in range(len(images))])


class Once(S4L):
    """Turns all images by the same angle, so that processes turn alike."""

    def draw(self, images):
        return torch.full((len(images),), 3)


def turned(rows: np.ndarray, quarters: list[int]) -> np.ndarray:
    return np.stack([np.rot90(row, -k, (-2, -1)) for row, k in zip(rows, quarters, strict=True)])


class TestS4L(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return S4L(Network(), num_classes=CLASSES)

    def plain(self):
        torch.manual_seed(5)
        return Once(Plain(), num_classes=CLASSES)

    def test_loss_is_the_formula(self):
        torch.manual_seed(5)
        method = Fixed(Plain(), num_classes=CLASSES, turned=0.3, rotation=0.7).train()
        one = batch(3)
        quarters = [1, 3, 2, 1, 3, 2]
        visible = np.ones((6, 8, 8), dtype=np.float32)
        for row, i, j in np.ndindex(3, 8, 8):
            places = ((i, j), (j, 7 - i), (7 - i, 7 - j), (7 - j, i))
            visible[3 + row, i, j] = all(one.valid[row, a, b] for a, b in places)
        assert visible[5].sum() == 4  # the last three columns are padding
        images = np.concatenate([one.images.numpy(), one.unlabeled.numpy()]) * visible[:, None]
        everything = np.concatenate([images, turned(images, quarters)])
        with torch.no_grad():
            logits = method.model(torch.from_numpy(everything))
            scores = method.head(logits * torch.from_numpy(np.concatenate([visible, visible]))[:, None]).numpy()
        logits = logits.numpy()
        masks = one.masks.numpy()
        parts = {
            "supervised": naive.supervised(logits[:3], masks),
            "turned": naive.supervised(logits[6:9], turned(masks, quarters[:3])),
            "rotation": sum(
                naive.cross_entropy(score, angle) for score, angle in zip(scores, [0] * 6 + quarters, strict=True)
            )
            / 12,
            "accuracy": sum(score.argmax() == angle for score, angle in zip(scores, [0] * 6 + quarters, strict=True))
            / 12,
        }
        losses = method(one)
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-5), name
        total = parts["supervised"] + 0.3 * parts["turned"] + 0.7 * parts["rotation"]
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-5)

    def test_copies_are_turned_by_every_angle_alike(self):
        torch.manual_seed(0)
        quarters = Counter(self.make().draw(torch.zeros(3000, 1, 1, 1)).tolist())
        assert set(quarters) == {1, 2, 3}
        assert all(900 < count < 1100 for count in quarters.values())

    def test_one_forward_pass_sees_both_streams_and_their_copies(self):
        method = self.make().train()
        seen = [rows_seen(part) for part in (method.model.network.encoder, method.head)]
        method(batch(3))
        assert seen == [[12], [12]]

    def test_the_head_learns_from_the_rotation_alone(self):
        gradients = []
        for weights in ({"turned": 0.0, "rotation": 0.1}, {"turned": 5.0, "rotation": 0.1}, {"rotation": 0.0}):
            torch.manual_seed(5)
            method = Once(Plain(), num_classes=CLASSES, **weights).train()
            method(batch()).total.backward()
            gradients.append([p.grad for p in method.head.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients[:2], strict=True))
        assert any(gradient.any() for gradient in gradients[0])
        assert not any(gradient.any() for gradient in gradients[2])

    @pytest.mark.parametrize("term", ["turned", "rotation"])
    def test_each_term_reaches_the_network(self, term):
        gradients = []
        for weight in (0.0, 1.0):
            torch.manual_seed(5)
            method = Once(Plain(), num_classes=CLASSES, **{"turned": 0.0, "rotation": 0.0, term: weight}).train()
            method(batch()).total.backward()
            gradients.append(method.model.network.encoder.weight.grad)
        assert not torch.allclose(*gradients)

    def test_unlabeled_images_teach_the_rotation(self):
        method, one = self.plain().train(), batch()
        other = one._replace(unlabeled=one.unlabeled.flip(2))
        assert method(one).logged["rotation"] != method(other).logged["rotation"]
        assert torch.equal(method(one).logged["turned"], method(other).logged["turned"])

    def test_images_that_are_padding_do_not_count(self):
        method, one = self.plain().eval(), batch(2)
        valid = one.valid.clone()
        valid[0] = False
        alone = one._replace(unlabeled=one.unlabeled[1:], valid=one.valid[1:])
        found, expected = method(one._replace(valid=valid)).logged["rotation"], method(alone).logged["rotation"]
        torch.testing.assert_close(found, expected)

    def test_padding_does_not_tell_the_angle(self):
        """Two images of one color, with and without padding: all turns look alike to the network."""
        method, one = self.plain().eval(), batch()
        seen = []
        method.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        method(one._replace(unlabeled=torch.ones_like(one.unlabeled)))
        originals, copies = seen[0].chunk(2)
        assert torch.equal(originals[2:], copies[2:])
        assert not originals[3, :, :, -3:].any()

    def test_the_head_has_the_parameters_of_the_authors_and_the_base_rate(self):
        method = S4L(Network(), num_classes=21)
        assert sum(p.numel() for p in method.head.parameters()) == 21_529
        (optimizer,) = method.optimizers(TrainConfig(steps=1, lr=0.1, head_lr_factor=10))
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {rates[id(p)] for p in method.head.parameters()} == {0.1}
        assert {rates[id(p)] for p in method.model.network.head.parameters()} == {1.0}
        assert set(rates) == {id(p) for p in method.parameters()}

    def test_takes_an_optimizer_of_the_user(self):
        method = self.make()
        (optimizer,) = method.optimizers(TrainConfig(steps=1, optimizer=torch.optim.AdamW))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(method.parameters()))

    def test_images_must_be_square(self):
        one = batch()
        with pytest.raises(ValueError, match=r"crops measure 8 x 6; expected square ones: WeakAugment\(8\)"):
            self.make()(
                one._replace(images=one.images[..., :6], unlabeled=one.unlabeled[..., :6], masks=one.masks[..., :6])
            )

    @pytest.mark.parametrize("name", ["turned", "rotation"])
    def test_refuses_negative_weights(self, name):
        with pytest.raises(ValueError, match=f"{name} is -1; expected 0 or more"):
            S4L(Plain(), num_classes=CLASSES, **{name: -1})

    def test_tells_how_many_classes_there_are(self):
        with pytest.raises(ValueError, match="num_classes is 4, but the network gives 3 classes"):
            S4L(Plain(), num_classes=4)(batch())
