from __future__ import annotations

import pytest
import torch

from stseg.modules import PixelShuffleDecoder, RotationHead


@pytest.mark.parametrize(("channels", "parameters"), [(512, 16_296), (2048, 48_552)])
def test_the_decoder_has_the_parameters_of_the_authors(channels, parameters):
    assert sum(p.numel() for p in PixelShuffleDecoder(channels, 21).parameters()) == parameters


@pytest.mark.parametrize("upsampling", [1, 2, 4, 16])
def test_the_decoder_enlarges_its_map(upsampling):
    decoder = PixelShuffleDecoder(5, 3, upsampling)
    assert decoder(torch.rand(2, 5, 3, 4)).shape == (2, 3, 3 * upsampling, 4 * upsampling)


def test_logits_may_be_negative():
    torch.manual_seed(0)
    logits = PixelShuffleDecoder(512, 21)(torch.rand(2, 512, 8, 8))
    assert 0.2 < (logits < 0).float().mean() < 0.8


def test_the_four_pixels_of_a_shuffle_start_alike():
    torch.manual_seed(0)
    decoder = PixelShuffleDecoder(5, 3, 2)
    logits = decoder(torch.rand(1, 5, 4, 4))
    assert logits.any()
    assert all(torch.equal(logits[..., i::2, j::2], logits[..., ::2, ::2]) for i in (0, 1) for j in (0, 1))


@pytest.mark.parametrize("upsampling", [0, -2, 3, 12])
def test_the_decoder_refuses_other_factors(upsampling):
    with pytest.raises(ValueError, match=f"upsampling is {upsampling}; expected a power of 2"):
        PixelShuffleDecoder(5, 3, upsampling)


def test_the_rotation_head_has_the_parameters_of_the_authors():
    assert sum(p.numel() for p in RotationHead(21).parameters()) == 21_529


@pytest.mark.parametrize("size", [(4, 4), (9, 16)])
def test_the_rotation_head_scores_whole_images(size):
    assert RotationHead(3)(torch.rand(2, 3, *size)).shape == (2, 4)
