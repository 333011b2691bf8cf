from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch

from stseg import Segmenter, TrainConfig
from stseg.methods import S4GAN


def maps(classes: np.ndarray, images: np.ndarray, own: np.ndarray, other: np.ndarray) -> torch.Tensor:
    """What the critic sees: pixels outside of either window are 0 in every channel."""
    seen = np.zeros((len(images), classes.shape[1] + images.shape[1], *images.shape[2:]), dtype=np.float32)
    for b, i, j in np.ndindex(*own.shape):
        if own[b, i, j] and other[b % len(other), i, j]:
            seen[b, :, i, j] = [*classes[b, :, i, j], *images[b, :, i, j]]
    return torch.from_numpy(seen)


def binary(scores: np.ndarray, *, real: bool) -> float:
    return float(np.mean([np.logaddexp(0, -s if real else s) for s in scores]))


def chosen_by(method: S4GAN, one, rows: int) -> float:
    """A threshold that the scores of some unlabeled images exceed."""
    method.threshold = 0.0
    scores = []
    handle = method.critic.register_forward_hook(lambda module, inputs, output: scores.append(output[0].detach()))
    method(one)
    handle.remove()
    ranked = scores[0].sigmoid().sort(descending=True).values
    return float(ranked[rows - 1 : rows + 1].mean())


class TestS4GAN(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return S4GAN(Network(), num_classes=CLASSES, threshold=0.4)

    def plain(self):
        torch.manual_seed(5)
        return S4GAN(Plain(), num_classes=CLASSES, threshold=0.4, dropout=0.0)

    @pytest.mark.parametrize(("unlabeled_rows", "step"), [(2, 0), (2, 1), (3, 1)])
    def test_loss_is_the_formula(self, unlabeled_rows, step):
        torch.manual_seed(1)
        method = S4GAN(Plain(), num_classes=CLASSES, matching=0.3, semi=0.7, dropout=0.0)
        wide = batch(3)
        one = batch(2, step=step)._replace(unlabeled=wide.unlabeled[:unlabeled_rows], valid=wide.valid[:unlabeled_rows])
        one.valid[0, 4:, 4:] = False
        method.threshold = chosen_by(method, one, rows=1)
        known, valid = (one.masks != 255).numpy(), one.valid.numpy()
        with torch.no_grad():
            labeled, unlabeled = method.model(one.images).numpy(), method.model(one.unlabeled).numpy()
            probabilities, true = np.zeros_like(unlabeled), np.zeros((2, CLASSES, 8, 8))
            for b, i, j in np.ndindex(unlabeled_rows, 8, 8):
                probabilities[b, :, i, j] = naive.softmax(unlabeled[b, :, i, j].astype(np.float64))
            for b, i, j in np.ndindex(2, 8, 8):
                if known[b, i, j]:
                    true[b, one.masks[b, i, j], i, j] = 1
            real_score, real = (x.numpy() for x in method.critic(maps(true, one.images.numpy(), known, valid)))
            fake_score, fake = (
                x.numpy() for x in method.critic(maps(probabilities, one.unlabeled.numpy(), valid, known))
            )
        labels, _ = naive.targets(unlabeled)
        chosen = 1 / (1 + np.exp(-fake_score)) > method.threshold
        assert chosen.sum() == 1
        matching = sum(abs(real[:, c].mean() - fake[:, c].mean()) for c in range(512)) / 512
        semi = naive.supervised(unlabeled, np.where(valid & chosen[:, None, None], labels, 255))
        parts = {
            "supervised": naive.supervised(labeled, one.masks.numpy()),
            "matching": matching,
            "semi": semi,
            "critic": 0.5 * binary(fake_score, real=False) + 0.5 * binary(real_score, real=True),
            "trusted": 1 / unlabeled_rows,
        }
        losses = method(one)
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        total = parts["supervised"] + 0.3 * matching + (0.7 * semi if step else 0) + parts["critic"]
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)

    def test_images_of_which_the_critic_sees_nothing_are_not_trusted(self):
        method = S4GAN(Plain(), num_classes=CLASSES, threshold=0.0)
        one = batch()
        losses = method(one._replace(masks=torch.full_like(one.masks, 255)))
        assert float(losses.logged["trusted"]) == float(losses.logged["semi"]) == float(losses.logged["critic"]) == 0

    def test_the_critic_learns_from_its_own_loss_alone(self):
        gradients = []
        for weight in (0.0, 5.0):
            torch.manual_seed(1)
            method = S4GAN(Plain(), num_classes=CLASSES, matching=weight, semi=weight, threshold=0.0, dropout=0.0)
            method(batch()).total.backward()
            gradients.append([p.grad.clone() for p in method.critic.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_the_network_does_not_learn_from_the_critics_loss(self):
        torch.manual_seed(1)
        method = S4GAN(Plain(), num_classes=CLASSES, matching=0.0, semi=0.0)
        one = batch()
        method(one).total.backward()
        network = Plain()
        torch.nn.functional.cross_entropy(Segmenter(network)(one.images), one.masks, ignore_index=255).backward()
        for mine, theirs in zip(method.model.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)

    @pytest.mark.parametrize("term", ["matching", "semi"])
    def test_a_term_reaches_the_network(self, term):
        gradients = []
        for weight in (0.0, 1.0):
            torch.manual_seed(1)
            settings = {"matching": 0.0, "semi": 0.0, term: weight}
            method = S4GAN(Plain(), num_classes=CLASSES, threshold=0.0, **settings)
            method(batch()).total.backward()
            gradients.append(method.model.network.head.weight.grad)
        assert not torch.allclose(*gradients)

    def test_no_image_above_the_threshold_gives_no_self_training(self):
        method = self.plain()
        method.threshold = 1.0
        logged = method(batch()).logged
        assert logged["semi"] == logged["trusted"] == 0

    def test_the_void_of_masks_does_not_tell_them_from_predictions(self):
        """Both halves of what the critic sees have the same empty pixels."""
        method, seen = self.plain(), []
        method.critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        method(batch())
        fake, real = seen[2], seen[3]
        assert torch.equal((fake == 0).all(1), (real == 0).all(1))
        assert (fake == 0).all(1).any()

    def test_has_an_adam_for_the_critic(self):
        method = self.make()
        network, critic = method.optimizers(TrainConfig(steps=1, lr=0.01))
        assert isinstance(critic, torch.optim.Adam)
        assert (critic.param_groups[0]["lr"], critic.param_groups[0]["betas"]) == (1e-4, (0.9, 0.99))
        held = {id(p) for group in critic.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.critic.parameters()}
        assert held.isdisjoint(id(p) for group in network.param_groups for p in group["params"])

    def test_the_critic_has_as_many_parameters_as_the_authors(self):
        assert sum(p.numel() for p in S4GAN(Plain(), num_classes=21).critic.parameters()) == 2_778_561

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"num_classes": 4}, "num_classes is 4.*gives 3"), ({"image_channels": 1}, "image_channels is 1.*have 3")],
    )
    def test_names_what_does_not_match(self, settings, message):
        method = S4GAN(Plain(), **{"num_classes": CLASSES, **settings})
        with pytest.raises(ValueError, match=message):
            method(batch())

    @pytest.mark.parametrize("settings", [{"matching": -1}, {"semi": -1}, {"threshold": 1.5}, {"dropout": 2}])
    def test_checks_its_settings(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            S4GAN(Plain(), num_classes=CLASSES, **settings)
