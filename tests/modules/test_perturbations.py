from __future__ import annotations

import pytest
import torch
from torch import nn

from stseg.functional import connected_components
from stseg.modules import (
    PixelShuffleDecoder,
    adversarial_perturbation,
    feature_drop,
    feature_noise,
    guided_cutout,
)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


class TestFeatureNoise:
    def test_is_in_proportion_and_uniform(self):
        torch.manual_seed(0)
        z = features(4, 50, 10, 10)
        change = feature_noise(z, 0.3) / z - 1
        assert change.min() >= -0.3 - 1e-6
        assert change.max() <= 0.3 + 1e-6
        assert change.mean().abs() < 0.005
        assert float(change.std()) == pytest.approx(0.6 / 12**0.5, rel=0.02)
        torch.testing.assert_close(change[0], change[1])  # the batch shares it

    def test_of_nothing_is_nothing(self):
        z = features(1, 2, 3, 3)
        assert torch.equal(feature_noise(z, 0.0), z)
        with pytest.raises(ValueError, match="amount is -1; expected 0 or more"):
            feature_noise(z, -1)


class TestFeatureDrop:
    @pytest.mark.parametrize("share", [0.0, 0.7, 0.9, 1.0])
    def test_zeroes_what_is_not_below_a_share_of_the_largest(self, share):
        z = features(3, 5, 6, 7)
        found = feature_drop(z, share, share)
        for b in range(3):
            attention = z[b].mean(0)
            for i in range(6):
                for j in range(7):
                    kept = float(attention[i, j]) < share * float(attention.max())
                    assert torch.equal(found[b, :, i, j], z[b, :, i, j] if kept else torch.zeros(5)), (b, i, j)

    def test_draws_one_share_for_the_batch(self):
        torch.manual_seed(0)
        z = torch.linspace(0.001, 1, 1000).expand(2, 1, 1, 1000)
        kept = torch.stack([(feature_drop(z) > 0).float().mean((1, 2, 3)) for _ in range(50)])
        assert torch.equal(kept[:, 0], kept[:, 1])
        assert 0.7 <= kept.min() < 0.72
        assert 0.88 < kept.max() <= 0.9

    def test_refuses_what_is_out_of_range(self):
        with pytest.raises(ValueError, match=r"low is 0.9 and high is 0.7; expected 0 <= low <= high <= 1"):
            feature_drop(features(1, 1, 2, 2), 0.9, 0.7)
        with pytest.raises(ValueError, match=r"features have shape \(2, 3, 4\); expected maps"):
            feature_drop(features(2, 3, 4))


class TestGuidedCutout:
    def test_zeroes_a_rectangle_in_the_box_of_every_object(self):
        torch.manual_seed(0)
        objects = torch.zeros(2, 12, 14, dtype=torch.bool)
        objects[0, 1:6, 2:12] = True  # 5 x 10: a rectangle of 2 x 4
        objects[0, 8:11, 3:6] = True  # 3 x 3: one position
        places = torch.zeros(12, 14)
        z = features(2, 3, 12, 14)
        for _ in range(300):
            found = guided_cutout(z, connected_components(objects))
            assert torch.equal(found[1], z[1])
            gone = (found[0] == 0).all(0)
            assert torch.equal(found[0], z[0] * ~gone)
            for box, sides in (((1, 6, 2, 12), (2, 4)), ((8, 11, 3, 6), (1, 1))):
                rows, columns = gone[box[0] : box[1], box[2] : box[3]].nonzero().unbind(1)
                assert (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) == sides
                assert len(rows) == sides[0] * sides[1]
            assert int(gone.sum()) == 9
            places += gone
        assert (places > 0).equal(objects[0])  # every position of both, and no other

    def test_zeroes_the_background_in_the_box_too(self):
        torch.manual_seed(0)
        ring = torch.ones(1, 10, 10, dtype=torch.bool)
        ring[:, 1:9, 1:9] = False
        gone = guided_cutout(torch.ones(1, 1, 10, 10), connected_components(ring)) == 0
        assert int(gone.sum()) == 16
        assert (gone[:, 0] & ~ring).any()

    @pytest.mark.parametrize(("share", "left"), [(0.0, 16), (1.0, 0)])
    def test_takes_no_share_or_all(self, share, left):
        z = torch.ones(1, 1, 4, 4)
        components = connected_components(torch.ones(1, 4, 4, dtype=torch.bool))
        assert int(guided_cutout(z, components, share).sum()) == left

    def test_leaves_small_objects(self):
        z, components = torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
        components[0, 1, 1] = 6
        assert torch.equal(guided_cutout(z, components), z)

    def test_refuses_what_does_not_match(self):
        with pytest.raises(ValueError, match=r"components have shape \(1, 4, 5\) and features \(1, 1, 4, 4\)"):
            guided_cutout(torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.int64))
        with pytest.raises(ValueError, match="share is 2; expected a number from 0 to 1"):
            guided_cutout(torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), 2)


class TestAdversarialPerturbation:
    def test_is_the_step_of_power_iteration(self):
        """As the authors compute it, but in float64, where a quotient of differences has a meaning."""
        torch.manual_seed(0)
        decoder, z = PixelShuffleDecoder(6, 3, 4), features(2, 6, 5, 4)
        torch.manual_seed(1)
        found = adversarial_perturbation(decoder, z, length=2.0)
        torch.manual_seed(1)
        d = torch.rand_like(z).double() - 0.5
        d = (1e-5 * d / d.square().sum((1, 2, 3), keepdim=True).sqrt()).requires_grad_()
        decoder.double()
        p = decoder(z.double()).softmax(1).detach()
        (p * (p.log() - decoder(z.double() + d).log_softmax(1))).sum().backward()
        expected = 2 * d.grad / d.grad.square().sum((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)

    def test_changes_the_prediction_more_than_chance(self):
        torch.manual_seed(0)
        decoder, z = nn.Conv2d(16, 3, 1), features(8, 16, 6, 6)
        chance = torch.randn_like(z)
        chance = 2 * chance / chance.square().sum((1, 2, 3), keepdim=True).sqrt()

        def moved(change):
            return float((decoder(z + change).softmax(1) - decoder(z).softmax(1)).square().sum().detach())

        assert moved(adversarial_perturbation(decoder, z)) > 3 * moved(chance)

    def test_leaves_no_gradients(self):
        decoder, z = nn.Conv2d(4, 3, 1), features(2, 4, 5, 5).requires_grad_()
        change = adversarial_perturbation(decoder, z)
        assert not change.requires_grad
        assert decoder.weight.grad is None
        assert z.grad is None

    def test_is_none_where_nothing_has_an_effect(self):
        decoder = nn.Conv2d(4, 3, 1)
        nn.init.zeros_(decoder.weight)
        assert not adversarial_perturbation(decoder, features(2, 4, 5, 5)).any()

    def test_is_computed_in_float32_under_autocast(self):
        torch.manual_seed(0)
        decoder, z = nn.Conv2d(4, 3, 1), features(2, 4, 5, 5)
        torch.manual_seed(1)
        expected = adversarial_perturbation(decoder, z)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(adversarial_perturbation(decoder, z), expected)
        assert adversarial_perturbation(decoder, z.bfloat16()).dtype == torch.bfloat16

    def test_refuses_a_negative_length(self):
        with pytest.raises(ValueError, match="length is -1; expected 0 or more"):
            adversarial_perturbation(nn.Conv2d(4, 3, 1), features(2, 4, 5, 5), -1)
