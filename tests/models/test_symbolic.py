"""Operations that tracers record for every size, and the programs that are recorded with them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

import stseg
from stseg.errors import NetworkError
from stseg.models import symbolic
from stseg.models.sides import Sides

if not hasattr(Dim, "DYNAMIC"):
    pytest.skip("this PyTorch exports no program for sizes that it does not know", allow_module_level=True)

SIZES = [(2, 64, 96), (1, 201, 187), (3, 33, 97), (1, 130, 31), (1, 9, 300), (2, 17, 9)]
ANY = {"images": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}


class Halved(nn.Module):
    """Joins maps of two sizes, which takes even sides, and pools to cells of unequal sizes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=8, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d((3, 2)), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.one(x)
        low = self.two(x)
        low = low + F.interpolate(self.pool(low), size=low.shape[-2:])
        return self.head(torch.cat([x, F.interpolate(low, scale_factor=8)], 1))


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return stseg.Segmenter(Halved()).eval()


def assert_equal_at_all_sizes(program, model, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width, generator=generator)
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)


@given(side=st.integers(1, 70), stride=st.integers(1, 40), least=st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_padding_is_that_of_the_segmenter(side, stride, least):
    sides, x = Sides(stride, least), torch.rand(2, 3, side, 5)
    height, width = sides.padded(side), sides.padded(5)
    expected = F.pad(x, (0, width - 5, 0, height - side), mode="replicate")
    assert torch.equal(symbolic.pad(x, sides), expected)
    assert torch.equal(symbolic.crop(expected, like=x), x)


@given(height=st.integers(1, 20), width=st.integers(1, 20), cells=st.tuples(st.integers(1, 8), st.integers(1, 8)))
@settings(deadline=None, max_examples=50)
def test_pooling_is_that_of_pytorch(height, width, cells):
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x, cells)
    area = F.interpolate(x, size=cells, mode="area")
    with symbolic.AveragePooling():
        torch.testing.assert_close(F.adaptive_avg_pool2d(x, cells), expected)
        torch.testing.assert_close(nn.AdaptiveAvgPool2d(cells)(x), expected)
        torch.testing.assert_close(F.interpolate(x, size=cells, mode="area"), area)
        assert nn.AdaptiveAvgPool2d((None, cells[1]))(x).shape == (2, 3, height, cells[1])
        assert F.adaptive_avg_pool2d(x[0], cells[0]).shape == (3, cells[0], cells[0])


def test_an_exported_program_is_right_at_other_sizes(model):
    images = torch.rand(2, 3, 256, 320)
    model(images[:1])
    program = torch.export.export(model, (images,), dynamic_shapes=ANY, strict=False)
    assert_equal_at_all_sizes(program.module(), model)


def test_an_exported_program_for_one_size_refuses_others(model):
    model(torch.rand(1, 3, 64, 64))
    program = torch.export.export(model, (torch.rand(1, 3, 41, 30),), strict=False).module()
    assert_equal_at_all_sizes(program, model, [(1, 41, 30)])
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.rand(1, 3, 48, 32))


@pytest.mark.filterwarnings("ignore")
def test_a_traced_program_is_right_at_other_sizes(model):
    model(torch.rand(1, 3, 64, 64))
    program = torch.jit.trace(model, torch.rand(2, 3, 256, 320), check_trace=False)
    assert_equal_at_all_sizes(program, model, [*SIZES, (1, 1, 1)])


@pytest.mark.parametrize("strict", [False, True])
def test_unknown_sides_are_refused(strict):
    with pytest.raises(Exception, match="called once before it is exported"):
        torch.export.export(stseg.Segmenter(Halved()).eval(), (torch.rand(2, 3, 256, 320),), strict=strict)


@pytest.mark.filterwarnings("ignore")
def test_views_of_several_scales_are_refused():
    model = stseg.MultiScaleFlip(nn.Conv2d(3, 2, 1), scales=(0.5, 1.0)).eval()
    model(torch.rand(1, 3, 8, 8))
    with pytest.raises(NetworkError, match="cannot be exported for several sizes"):
        torch.jit.trace(model, torch.rand(2, 3, 8, 8))
    with pytest.raises(NetworkError, match="cannot be exported for several sizes"):
        torch.export.export(model, (torch.rand(2, 3, 8, 8),), dynamic_shapes=ANY, strict=False)


def test_logits_of_another_size_are_refused_while_exported():
    class Shrinking(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[..., :-3]

    model = stseg.Segmenter(Shrinking(3, 2, 1), stride=4).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NetworkError, match="gives no logits that cover its image"):
            torch.jit.trace(model, torch.rand(1, 3, 16, 16))
        with pytest.raises(NetworkError, match="gives no logits that cover its image"):
            torch.export.export(model, (torch.rand(2, 3, 16, 16),), dynamic_shapes=ANY, strict=False)
