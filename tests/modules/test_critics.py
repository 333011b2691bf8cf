from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stseg.modules import ConvCritic, ImageCritic, conv_critic, frozen


@pytest.mark.parametrize(("channels", "parameters"), [(21, 2_783_169), (19, 2_781_121)])
def test_the_critic_has_the_parameters_of_the_paper(channels, parameters):
    assert sum(p.numel() for p in conv_critic(channels).parameters()) == parameters


def test_the_critic_halves_its_map_five_times():
    critic, sizes = conv_critic(2), []
    for layer in critic.layers:
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    critic(torch.zeros(1, 2, 321, 321))
    assert sizes[::2] == [160, 80, 40, 20, 10]


def bilinear_with_aligned_corners(scores, height, width):
    rows, columns = scores.shape
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v, u = y * (rows - 1) / max(height - 1, 1), x * (columns - 1) / max(width - 1, 1)
            top, left = min(int(v), rows - 1), min(int(u), columns - 1)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = v - top, u - left
            found[y, x] = (1 - a) * ((1 - b) * scores[top, left] + b * scores[top, right]) + a * (
                (1 - b) * scores[bottom, left] + b * scores[bottom, right]
            )
    return found


def test_scores_are_resized_with_aligned_corners():
    torch.manual_seed(0)
    critic, maps = ConvCritic(3), torch.rand(1, 3, 70, 101)
    with torch.no_grad():
        small, found = critic.layers(maps)[0, 0], critic(maps)[0, 0]
    np.testing.assert_allclose(found.numpy(), bilinear_with_aligned_corners(small.double().numpy(), 70, 101), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (31, 32), (33, 7), (64, 96)])
@pytest.mark.parametrize("out_channels", [1, 2])
def test_maps_of_any_size_get_scores_of_their_size(height, width, out_channels):
    critic = conv_critic(3, out_channels)
    maps = torch.rand(2, 3, height, width, requires_grad=True)
    scores = critic(maps)
    assert scores.shape == (2, out_channels, height, width)
    scores.square().sum().backward()
    assert (maps.grad != 0).any((0, 1)).all()  # every pixel has a say


def test_small_maps_are_padded_by_their_border():
    torch.manual_seed(0)
    critic, maps = conv_critic(3), torch.rand(1, 3, 20, 40)
    padded = torch.cat([maps, maps[:, :, -1:].expand(-1, -1, 12, -1)], 2)
    assert torch.equal(critic(maps), critic(padded)[:, :, :20])


class TestFrozen:
    def test_leaves_the_gradient_to_the_input(self):
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
        one, two = (torch.rand(1, 2, 9, 9, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        critic(one.requires_grad_()).sum().backward()
        wanted = one.grad
        critic.zero_grad(set_to_none=True)
        frozen(critic)(two.requires_grad_()).sum().backward()
        assert torch.equal(two.grad, wanted)
        assert all(p.grad is None and p.requires_grad for p in critic.parameters())

    def test_serves_two_losses_in_one_backward_pass(self):
        critic, network = nn.Conv2d(2, 1, 1), nn.Conv2d(3, 2, 1)
        prediction = network(torch.rand(1, 3, 4, 4)).softmax(1)
        (frozen(critic)(prediction).sum() + critic(prediction.detach()).square().sum()).backward()
        alone = nn.Conv2d(2, 1, 1)
        alone.load_state_dict(critic.state_dict())
        alone(prediction.detach()).square().sum().backward()
        assert torch.equal(critic.weight.grad, alone.weight.grad)
        assert network.weight.grad.any()

    def test_uses_the_parameters_of_the_moment(self):
        critic = nn.Linear(1, 1)
        judge = frozen(critic)
        with torch.no_grad():
            critic.weight.fill_(3.0)
            critic.bias.zero_()
        assert judge(torch.ones(1, 1)).item() == 3

    def test_leaves_running_statistics_to_the_module(self):
        norm = nn.BatchNorm2d(2)
        frozen(norm)(torch.rand(2, 2, 4, 4))
        assert norm.num_batches_tracked == 1
        assert F.relu(norm.running_mean).any()


class TestImageCritic:
    def test_has_the_parameters_of_the_paper(self):
        assert sum(p.numel() for p in ImageCritic(24).parameters()) == 2_778_561

    def test_halves_its_map_four_times(self):
        critic, sizes = ImageCritic(2), []
        for layer in critic.layers:
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
        critic(torch.zeros(1, 2, 321, 321))
        assert sizes == [160, 80, 40, 20]

    def test_drops_channels_after_the_first_three(self):
        kinds = [type(layer).__name__ for layer in ImageCritic(2).layers]
        assert kinds == ["Conv2d", "LeakyReLU", "Dropout2d"] * 3 + ["Conv2d", "LeakyReLU"]

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (15, 16), (33, 7)])
    def test_maps_of_any_size_get_one_score(self, height, width):
        maps = torch.rand(2, 3, height, width, requires_grad=True)
        scores, features = ImageCritic(3).eval()(maps)
        assert scores.shape == (2,)
        assert features.shape == (2, 512)
        scores.square().sum().backward()
        assert (maps.grad != 0).any((0, 1)).all()
