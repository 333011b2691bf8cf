from __future__ import annotations

import pytest
import torch

from stseg.modules import FlawDetector
from stseg.modules.flaw_detector import InstanceBatchNorm


def test_the_detector_has_the_parameters_of_the_authors():
    parameters = dict(FlawDetector(3 + 21).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == 8_294_017
    assert sum(p.numel() for name, p in parameters.items() if ".batch." in name) == 1_856


@pytest.mark.parametrize(("height", "width"), [(1, 1), (60, 60), (59, 61), (33, 70), (97, 65)])
def test_images_of_any_size_get_flaws_of_their_size(height, width):
    torch.manual_seed(0)
    detector = FlawDetector(5, width=4)
    images, probabilities = torch.rand(2, 3, height, width), torch.rand(2, 2, height, width, requires_grad=True)
    flaws = detector(images, probabilities)
    assert flaws.shape == (2, 1, height, width)
    flaws.square().sum().backward()
    assert probabilities.grad.any()


@pytest.mark.parametrize("side", [16, 64, 92])
def test_small_images_have_more_than_one_flaw(side):
    torch.manual_seed(0)
    flaws = FlawDetector(5, width=4)(torch.rand(2, 3, side, side), torch.rand(2, 2, side, side))
    assert (flaws.amax((2, 3)) - flaws.amin((2, 3)) > 1e-3).all()


def test_large_images_are_seen_as_they_are():
    torch.manual_seed(0)
    detector, images = FlawDetector(5, width=4), torch.rand(2, 5, 130, 161)
    seen = []
    detector.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    detector(images[:, :3], images[:, 3:])
    assert torch.equal(seen[0], images)


def test_half_of_the_channels_are_normalized_over_the_batch():
    norm, maps = InstanceBatchNorm(7), torch.randn(3, 7, 5, 6) * 4 + 2
    found = norm(maps)
    for channel in range(4):
        one = maps[:, channel]
        torch.testing.assert_close(found[:, channel], (one - one.mean()) / (one.var(correction=0) + 1e-5).sqrt())
    for row in range(3):
        for channel in range(4, 7):
            one = maps[row, channel]
            torch.testing.assert_close(found[row, channel], (one - one.mean()) / (one.var(correction=0) + 1e-5).sqrt())
