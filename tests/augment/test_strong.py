import colorsys
import copy
import itertools
import math
import pickle
import shutil

import kornia
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter
from scipy import integrate, ndimage, special, stats
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from stseg.augment import Cutout, StrongAugment

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OFF = {"jitter_p": 0, "gray_p": 0, "blur_p": 0, "cutout": None}
ALL = StrongAugment(jitter_p=1, gray_p=0.4, blur_p=0.8, cutout=Cutout(p=0.8), invert_p=0.3)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch(size=8, channels=3, height=24, width=20, dtype=torch.float32):
    return torch.rand(size, channels, height, width, dtype=dtype), torch.randint(21, (size, height, width)).byte()


def only_jitter(operation, strength):
    """All images are jittered, by one operation."""
    jitter = [0.0] * 4
    jitter[operation] = strength
    return StrongAugment(**OFF | {"jitter_p": 1, "jitter": jitter})


def bits(x):
    """What tells one NaN from another, and 0 from -0."""
    return x.contiguous().view(torch.uint8)


def assert_identical(found, wanted):
    assert found.dtype == wanted.dtype
    assert torch.equal(bits(found), bits(wanted))


# --- the recipe once more, one image at a time, in float64


def gray(image):
    """(H, W), as PIL weighs the channels."""
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2] if len(image) == 3 else image.mean(0)


def recolored(image, operation, factor):
    if operation == HUE:
        turned = image.copy()
        for row, column in np.ndindex(*image.shape[1:]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column])
            turned[:, row, column] = colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value)
        return turned
    other = {BRIGHTNESS: 0.0, CONTRAST: gray(image).mean(), SATURATION: gray(image)[None]}[operation]
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


def kernel(sigma, radius=6):
    """The Gaussian integrated over each of ``2 * radius + 1`` pixels, normalized."""
    integrals = np.diff(special.ndtr((np.arange(2 * radius + 2) - radius - 0.5) / sigma))
    return integrals / integrals.sum()


def blurred(image, sigma, radius=6):
    weights = kernel(sigma, radius)
    return ndimage.correlate1d(ndimage.correlate1d(image, weights, 1, mode="nearest"), weights, 2, mode="nearest")


def recipe(image, mask, p, i, *, operations=range(4), radius=6):
    """Image ``i`` of a batch with the parameters drawn for it."""
    image, mask = image.numpy().astype(np.float64), mask.numpy().copy()
    if p.invert is not None and p.invert[i]:
        image = 1 - image
    if p.jitter[i]:
        for operation in p.order[i].tolist()[: len(operations)]:
            assert operation in operations
            image = recolored(image, operation, float(p.factors[i, operation]))
    if p.gray[i] and len(image) == 3:
        image = np.stack([gray(image)] * 3)
    if p.blur[i]:
        image = blurred(image, float(p.sigma[i]), radius)
    if p.boxes is not None:
        top, left, bottom, right = p.boxes[i].tolist()
        image[:, top:bottom, left:right] = p.noise[i, :, top:bottom, left:right].numpy()
        mask[top:bottom, left:right] = 255
    return image, mask


def assert_is_the_recipe(strong, images, masks, *, atol, **options):
    parameters = strong.draw(images)
    found_images, found_masks = strong.transform(images, masks, parameters)
    assert found_images.dtype == images.dtype
    assert found_masks.dtype == masks.dtype
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        wanted_image, wanted_mask = recipe(image, mask, parameters, i, **options)
        np.testing.assert_allclose(found_images[i].double().numpy(), wanted_image, rtol=0, atol=atol)
        np.testing.assert_array_equal(found_masks[i].numpy(), wanted_mask)


@pytest.fixture(params=["row by row", "all at once"])
def way(request, monkeypatch):
    """As on a CPU, and as on a device whose values are not read."""
    if request.param == "all at once":
        read_no_value(monkeypatch)


def read_no_value(monkeypatch):
    for module in ("strong", "cutout"):
        monkeypatch.setattr(f"stseg.augment.{module}.may_read", lambda x: False)


@pytest.mark.usefixtures("way")
class TestRecipe:
    @pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.float32, 5e-6)])
    def test_of_the_paper(self, dtype, atol):
        """Forty images: nearly all orders of the color operations, each with and without all that follows."""
        assert_is_the_recipe(ALL, *batch(40, height=12, width=10, dtype=dtype), atol=atol)

    @pytest.mark.parametrize("strength", [1.0, 3.0])
    def test_with_colors_so_strong_that_every_step_clamps(self, strength):
        strong = StrongAugment(**OFF | {"jitter_p": 1, "jitter": (strength, strength, strength, 0.5)})
        images, masks = batch(30, height=8, width=8, dtype=torch.float64)
        images[::3] = images[::3].round()
        assert_is_the_recipe(strong, images, masks, atol=1e-6)

    @pytest.mark.parametrize(
        "on", [on for size in range(5) for on in itertools.combinations(range(4), size)], ids=lambda on: f"on{on}"
    )
    def test_with_some_of_the_color_operations(self, on):
        jitter = [0.25 if operation in on else 0.0 for operation in range(4)]
        strong = StrongAugment(**OFF | {"jitter_p": 0.8, "jitter": jitter})
        assert_is_the_recipe(strong, *batch(12, height=4, width=5, dtype=torch.float64), atol=1e-7, operations=on)

    def test_in_every_order_of_the_colors(self):
        strong = StrongAugment(**OFF | {"jitter_p": 1, "jitter": (1, 1, 1, 0.5)})
        images, masks = batch(24, height=6, width=6, dtype=torch.float64)
        orders = torch.tensor(list(itertools.permutations(range(4))))
        parameters = strong.draw(images)._replace(order=orders)
        found, _ = strong.transform(images, masks, parameters)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            np.testing.assert_allclose(found[i], recipe(image, mask, parameters, i)[0], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("chances", [*itertools.product((0, 1), repeat=4)])
    def test_with_what_all_images_get_or_none(self, chances):
        jitter_p, gray_p, blur_p, p = chances
        strong = StrongAugment(jitter_p=jitter_p, gray_p=gray_p, blur_p=blur_p, cutout=Cutout(p=p))
        assert_is_the_recipe(strong, *batch(5, height=9, width=8), atol=5e-6)

    def test_turns_every_hue_by_every_angle(self):
        """Colors with channels that are equal or at the ends, turned by whole sixths of the circle and in between."""
        levels = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
        colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)
        turns = torch.tensor([n / 24 for n in range(-12, 13)])
        strong = only_jitter(HUE, 0.5)
        images, masks = colors.repeat(25, 1, 1, 1), torch.zeros(25, 8, 8, dtype=torch.uint8)
        parameters = strong.draw(images)
        parameters.factors[:, HUE] = turns
        found, _ = strong.transform(images, masks, parameters)
        for image, result, turn in zip(images, found, turns, strict=True):
            np.testing.assert_allclose(result, recolored(image.numpy(), HUE, float(turn)), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("channels", [1, 2, 4, 6])
    def test_without_rgb_leaves_out_what_needs_it(self, channels):
        images, masks = batch(30, channels, 12, 10, dtype=torch.float64)
        assert_is_the_recipe(ALL, images, masks, atol=1e-7, operations=(BRIGHTNESS, CONTRAST))

    @pytest.mark.parametrize(("sigma", "radius"), [((0.1, 2.0), 6), ((3.0, 4.0), 12), ((1e-3, 1e-2), 6)])
    @pytest.mark.parametrize("shape", [(24, 20), (3, 2), (1, 1), (1, 30)])
    def test_blurs_images_smaller_than_the_kernel(self, sigma, radius, shape):
        strong = StrongAugment(**OFF | {"blur_p": 1, "blur_sigma": sigma})
        assert_is_the_recipe(strong, *batch(4, 3, *shape, dtype=torch.float64), atol=1e-6, radius=radius)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 4), st.sampled_from([1, 3, 4]), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))
    def test_of_any_size(self, size, channels, height, width, seed):
        torch.manual_seed(seed)
        operations = range(4) if channels == 3 else (BRIGHTNESS, CONTRAST)
        assert_is_the_recipe(
            ALL, *batch(size, channels, height, width, dtype=torch.float64), atol=1e-6, operations=operations
        )

    @pytest.mark.parametrize(
        ("operation", "enhance"),
        [
            (BRIGHTNESS, ImageEnhance.Brightness),
            (CONTRAST, ImageEnhance.Contrast),
            (SATURATION, ImageEnhance.Color),
        ],
    )
    def test_has_the_colors_of_pil(self, operation, enhance):
        """To within its roundings to 8 bits, of gray, of the mean and of the result."""
        images = torch.randint(256, (20, 3, 16, 12))
        strong = only_jitter(operation, 0.5)
        parameters = strong.draw(images / 255)
        found, _ = strong.transform(images / 255, torch.zeros(20, 16, 12, dtype=torch.uint8), parameters)
        for image, result, factor in zip(images, found, parameters.factors[:, operation], strict=True):
            pil = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
            wanted = np.array(enhance(pil).enhance(float(factor))).transpose(2, 0, 1)
            assert np.abs(result.numpy() * 255 - wanted).max() < 1.51


@pytest.mark.usefixtures("way")
class TestBlur:
    """The weights of the kernel, seen in the image of a vertical line."""

    def weights(self, sigma, dtype=torch.float32, high=2.0):
        images = torch.zeros(len(sigma), 1, 3, 41, dtype=dtype)
        images[..., 20] = 1
        strong = StrongAugment(**OFF | {"blur_p": 1, "blur_sigma": (0.001, high)})
        parameters = strong.draw(images)._replace(sigma=torch.tensor(sigma))
        return strong.transform(images, torch.zeros(len(sigma), 3, 41).byte(), parameters)[0][:, 0, 1].numpy()

    @pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-7), (torch.float64, 1e-7)])
    def test_integrates_the_gaussian_over_each_pixel(self, dtype, atol):
        """By numerical integration; sigma itself is in float32."""
        sigmas = [0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.0]
        for found, sigma in zip(self.weights(sigmas, dtype), sigmas, strict=True):
            density = stats.norm(scale=sigma).pdf
            # The corners of the density as points, or the integration misses a narrow peak.
            pixels = [
                integrate.quad(density, n - 0.5, n + 0.5, points=[n - 4 * sigma, n, n + 4 * sigma])[0]
                for n in range(-6, 7)
            ]
            np.testing.assert_allclose(found[14:27], np.array(pixels) / sum(pixels), rtol=0, atol=atol)
            assert not found[:14].any()
            assert not found[27:].any()

    def test_sums_to_one_however_wide(self):
        sigmas = [1e-3, 0.05, 0.5, 2.0, 6.0]
        np.testing.assert_allclose(self.weights(sigmas, high=6.0).sum(1), 1, rtol=0, atol=1e-6)

    def test_of_no_width_is_the_image(self):
        line = np.eye(41)[[20]]
        np.testing.assert_array_equal(self.weights([0.0]), line)

    @pytest.mark.parametrize(
        ("radii", "atol"),
        [((0.1, 0.2, 0.3), 0.03), ((0.4, 0.45, 0.5, 0.6, 0.8), 0.11), ((1.0, 1.25, 1.5, 1.75, 2.0), 0.03)],
    )
    def test_is_near_the_three_box_blurs_of_pil(self, radii, atol):
        """PIL keeps the variance sigma²; a Gaussian over pixels has that of a pixel, 1/12, on top of it."""
        line = np.zeros((41, 41), np.uint8)
        line[:, 20] = 255
        for found, radius in zip(self.weights(list(radii)), radii, strict=True):
            pil = np.array(Image.fromarray(line).filter(ImageFilter.GaussianBlur(radius)))[20]
            np.testing.assert_allclose(found, pil / 255, rtol=0, atol=atol)


class TestKornia:
    """The two operations written again, for speed and so as not to read values back, compute what kornia's do."""

    def test_has_the_same_hue(self):
        images, masks = batch(16)
        images[0], images[1] = images[0].round(), images[1, :1]  # pure colors, and grays
        strong = only_jitter(HUE, 0.5)
        parameters = strong.draw(images)
        found, _ = strong.transform(images, masks, parameters)
        wanted = kornia.enhance.adjust_hue(images, parameters.factors[:, HUE] * 2 * math.pi)
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
        assert (found - images).abs().amax((1, 2, 3))[2:].min() > 1e-3

    def test_has_the_same_blur(self):
        images, masks = batch(16)
        strong = StrongAugment(**OFF | {"blur_p": 1})
        parameters = strong.draw(images)
        found, _ = strong.transform(images, masks, parameters)
        kernels = kornia.filters.get_gaussian_erf_kernel1d(13, parameters.sigma[:, None])
        wanted = kornia.filters.filter2d_separable(images, kernels, kernels, border_type="replicate")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


class TestDraws:
    """What is drawn for many images, seen in the images where that is possible."""

    size = 6000

    def flat(self, *color):
        """Many images of one pixel of a color."""
        return torch.tensor(color).view(1, 3, 1, 1).expand(self.size, 3, 1, 1)

    def seen(self, strong, images):
        masks = torch.zeros(len(images), *images.shape[2:], dtype=torch.uint8)
        return strong(images, masks)[0].double().numpy()

    @pytest.mark.parametrize(
        ("name", "default"), [("jitter_p", 0.8), ("gray_p", 0.2), ("blur_p", 0.5), ("cutout", 0.5)]
    )
    def test_each_comes_with_its_probability(self, name, default):
        images = torch.rand(1, 3, 16, 16).expand(2000, -1, -1, -1)  # large enough for the smallest cutout
        for p in (None, 0.0, 0.35, 1.0):
            options = OFF | {"blur_sigma": (1, 2)}  # less may change nothing in float32
            options |= {name: getattr(StrongAugment(), name) if p is None else Cutout(p=p) if name == "cutout" else p}
            found = self.seen(StrongAugment(**options), images)
            changed = int((found != images.double().numpy()).any((1, 2, 3)).sum())
            assert stats.binomtest(changed, 2000, default if p is None else p).pvalue > 1e-3

    def test_brightness_is_uniform(self):
        factor = self.seen(only_jitter(BRIGHTNESS, 0.5), self.flat(0.2, 0.4, 0.6)) / [[[0.2]], [[0.4]], [[0.6]]]
        assert np.ptp(factor, axis=1).max() < 1e-6
        assert stats.kstest(factor[:, 0].ravel(), "uniform", (0.5, 1)).pvalue > 1e-3

    def test_contrast_is_uniform(self):
        images = torch.tensor([0.4, 0.6]).expand(self.size, 3, 1, 2)
        found = self.seen(only_jitter(CONTRAST, 0.5), images)
        np.testing.assert_allclose(found.mean((1, 2, 3)), 0.5, atol=1e-6)
        factor = (found[:, 0, 0, 1] - found[:, 0, 0, 0]) / 0.2
        assert stats.kstest(factor, "uniform", (0.5, 1)).pvalue > 1e-3

    def test_saturation_is_uniform(self):
        found = self.seen(only_jitter(SATURATION, 0.5), self.flat(0.5, 0.4, 0.6))
        factor = (found[:, 2] - found[:, 1]).ravel() / 0.2
        assert stats.kstest(factor, "uniform", (0.5, 1)).pvalue > 1e-3

    @pytest.mark.parametrize("strength", [0.25, 0.1, 0.5])
    def test_hue_is_uniform(self, strength):
        found = self.seen(only_jitter(HUE, strength), self.flat(0.2, 0.8, 0.3))
        before = colorsys.rgb_to_hsv(0.2, 0.8, 0.3)
        after = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in found[:, :, 0, 0]])
        np.testing.assert_allclose(after[:, 1:], np.broadcast_to(before[1:], (self.size, 2)), atol=1e-5)
        shift = (after[:, 0] - before[0] + 0.5) % 1 - 0.5
        assert stats.kstest(shift, "uniform", (-strength, 2 * strength)).pvalue > 1e-3

    def test_factors_are_never_negative(self):
        parameters = StrongAugment(jitter=(2, 2, 2, 0)).draw(torch.zeros(self.size, 3, 1, 1))
        for operation in (BRIGHTNESS, CONTRAST, SATURATION):
            assert stats.kstest(parameters.factors[:, operation].numpy(), "uniform", (0, 3)).pvalue > 1e-3

    def test_sigma_is_uniform_in_the_images(self):
        """The spread of an impulse, measured in each image, against the drawn and against the uniform one."""
        images = torch.zeros(1500, 1, 13, 13, dtype=torch.float64)
        images[:, :, 6, 6] = 1
        strong = StrongAugment(**OFF | {"blur_p": 1})
        parameters = strong.draw(images)
        found = strong.transform(images, torch.zeros(1500, 13, 13, dtype=torch.uint8), parameters)[0][:, 0].numpy()
        sigma = parameters.sigma.double().numpy()
        np.testing.assert_allclose(found.sum((1, 2)), 1, atol=1e-6)
        offsets = np.arange(-6, 7)
        for axis in (1, 2):
            spread = np.sqrt((found.sum(3 - axis) * offsets**2).sum(1))
            # The variance of a pixel, 1/12, comes on top, but for narrow Gaussians, which hardly leave theirs.
            wide = sigma > 0.6
            np.testing.assert_allclose(spread[wide], np.sqrt(sigma[wide] ** 2 + 1 / 12), rtol=0.012)
            assert (spread[~wide] < 0.67).all()
        # The ratio of the pixel beside the center to the center rises with sigma and so gives it.
        ratio = found[:, 6, 7] / found[:, 6, 6]
        sigmas = np.linspace(0.09, 2.01, 20_000)
        seen = np.interp(ratio, [kernel(sigma)[7] / kernel(sigma)[6] for sigma in sigmas], sigmas)
        np.testing.assert_allclose(seen, sigma, rtol=1e-4)
        assert stats.kstest(seen, "uniform", (0.1, 1.9)).pvalue > 1e-3

    @pytest.mark.parametrize("channels", [3, 1])
    def test_all_orders_are_equally_likely_for_each_image(self, channels):
        strong = StrongAugment(cutout=None)
        order = strong.draw(torch.zeros(12000, channels, 1, 1)).order.numpy()
        np.testing.assert_array_equal(np.sort(order, 1), np.broadcast_to(np.arange(4), (12000, 4)))
        used = order if channels == 3 else order[:, :2]
        found, counts = np.unique(used, axis=0, return_counts=True)
        assert len(found) == (24 if channels == 3 else 2)
        assert {*found.ravel()} == ({0, 1, 2, 3} if channels == 3 else {BRIGHTNESS, CONTRAST})
        assert stats.chisquare(counts).pvalue > 1e-3
        following = np.zeros((4, 4))
        np.add.at(following, (used[:-1, 0], used[1:, 0]), 1)
        possible = used.max() + 1
        assert stats.chi2_contingency(following[:possible, :possible]).pvalue > 1e-3

    def test_all_are_independent(self, monkeypatch):
        read_no_value(monkeypatch)  # noise for all images
        p = StrongAugment().draw(torch.zeros(8000, 3, 4, 4))
        columns = [p.jitter, p.gray, p.blur, p.sigma, *p.factors.T, *(p.order == HUE).T[:3], p.order[:, 0] == CONTRAST]
        columns += [p.boxes[:, 2] > 0, p.noise[:, 0, 0, 0]]
        correlation = np.corrcoef(np.stack([c.double().numpy() for c in columns]))
        correlation[8:12, 8:12] = 0  # the places in one order exclude one another
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 4.5 / math.sqrt(8000)
        shifted = np.array([np.corrcoef(c[:-1].double(), c[1:].double())[0, 1] for c in columns])
        assert np.abs(shifted).max() < 4.5 / math.sqrt(8000)


class TestRowsNotDrawn:
    """Images that are left out of all by chance."""

    drawn = torch.tensor([True, False, False, True, False, True])

    def parameters(self, images):
        p = ALL.draw(images)
        return p._replace(
            jitter=p.jitter & self.drawn,
            gray=p.gray & self.drawn,
            blur=p.blur & self.drawn,
            invert=p.invert & self.drawn,
            boxes=p.boxes * self.drawn[:, None],
        )

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("value", [0.5, -0.0, 1.1, math.nan, math.inf])
    def test_are_bit_identical(self, dtype, value):
        images, masks = batch(6, dtype=dtype)
        images[~self.drawn, :, ::2] = value
        found, found_masks = ALL.transform(images, masks, self.parameters(images))
        assert_identical(found[~self.drawn], images[~self.drawn])
        assert_identical(found_masks[~self.drawn], masks[~self.drawn])

    def test_cost_nothing(self):
        """On a CPU no color is computed for an image that gets none."""
        images, masks = batch(6)
        p = ALL.draw(images)
        nothing = torch.zeros(6, dtype=torch.bool)
        with Operations() as operations:
            ALL.transform(images, masks, p._replace(jitter=nothing, gray=nothing, blur=nothing))
        assert not operations.names & {"lerp", "clamp", "clamp_", "maximum", "addcmul", "addcmul_"}


class TestRowsLeftOut:
    where = torch.tensor([True, False, False, True, False, True])

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int32, torch.int64])
    @pytest.mark.parametrize("value", [0.5, -0.0, -3.0, 7.0, math.nan, math.inf, -math.inf])
    def test_are_bit_identical(self, dtype, mask_dtype, value):
        images, masks = batch(6, dtype=dtype)
        masks = masks.to(mask_dtype)
        images[~self.where, :, ::2] = value
        found, found_masks = ALL(images, masks, self.where)
        assert_identical(found[~self.where], images[~self.where])
        assert_identical(found_masks[~self.where], masks[~self.where])
        assert found.dtype == dtype
        assert found[self.where].isfinite().all()
        assert ((found != images).any(3).any(2).any(1) == self.where)[self.where].all()

    def test_change_nothing_for_the_others(self):
        images, masks = batch(6)
        parameters = ALL.draw(images)
        everything = ALL.transform(images, masks, parameters)
        images[~self.where] = math.nan
        masks[~self.where] = 99
        for found, wanted in zip(ALL.transform(images, masks, parameters, self.where), everything, strict=True):
            assert_identical(found[self.where], wanted[self.where])

    @pytest.mark.parametrize("strong", [ALL, StrongAugment(**OFF)], ids=["all", "off"])
    def test_may_be_all_of_them(self, strong):
        images, masks = batch(6, dtype=torch.bfloat16)
        found, found_masks = strong(images, masks, torch.zeros(6, dtype=torch.bool))
        assert_identical(found, images)
        assert_identical(found_masks, masks)


class TestInput:
    @pytest.mark.parametrize("strong", [ALL, StrongAugment(**OFF), StrongAugment(**OFF | {"cutout": Cutout(p=0)})])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("where", [None, torch.tensor([True, False] * 4), torch.zeros(8, dtype=torch.bool)])
    def test_is_neither_changed_nor_shared(self, strong, dtype, where):
        images, masks = batch(dtype=dtype)
        copies = images.clone(), masks.clone()
        parameters = strong.draw(images)
        drawn = copy.deepcopy(parameters)
        for x in strong.transform(images, masks, parameters, where):
            x.zero_()
        assert_identical(images, copies[0])
        assert_identical(masks, copies[1])
        for one, other in zip(parameters, drawn, strict=True):
            assert one is other is None or torch.equal(one, other)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_of_half_precision_is_computed_in_float32(self, dtype):
        images, masks = batch(dtype=dtype)
        parameters = ALL.draw(images)
        found, _ = ALL.transform(images, masks, parameters)
        wanted, _ = ALL.transform(images.float(), masks, parameters)
        assert_identical(found, wanted.to(dtype))

    def test_under_autocast_is_computed_in_float32(self):
        images, masks = batch()
        parameters = ALL.draw(images)
        wanted, _ = ALL.transform(images, masks, parameters)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = ALL.transform(images, masks, parameters)
        assert_identical(found, wanted)

    @pytest.mark.parametrize("layout", ["channels last", "expanded", "sliced", "requires grad"])
    def test_may_have_any_layout(self, layout):
        images, masks = batch()
        if layout == "channels last":
            images = images.contiguous(memory_format=torch.channels_last)
        elif layout == "expanded":
            images, masks = images[:1].expand(8, -1, -1, -1), masks[:1].expand(8, -1, -1)
        elif layout == "sliced":
            images, masks = images[..., ::2, 1:], masks[..., ::2, 1:]
        else:
            images.requires_grad_()
        parameters = ALL.draw(images)
        found, found_masks = ALL.transform(images, masks, parameters)
        plain = images.detach().clone(memory_format=torch.contiguous_format)
        wanted, wanted_masks = ALL.transform(plain, masks.clone(), parameters)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        assert torch.equal(found_masks, wanted_masks)
        assert not found.requires_grad

    def test_may_be_no_image(self):
        images, masks = batch(0)
        found, found_masks = ALL(images, masks, torch.zeros(0, dtype=torch.bool))
        assert found.shape == images.shape
        assert found_masks.shape == masks.shape


class TestSeed:
    @pytest.mark.parametrize("given", ["seed", "generator"])
    def test_decides_everything(self, given):
        images, masks = batch()

        def run(seed):
            if given == "generator":
                return ALL(images, masks, generator=torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)
            return ALL(images, masks)

        first, again, other = run(5), run(5), run(6)
        assert_identical(first[0], again[0])
        assert_identical(first[1], again[1])
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])

    def test_of_torch_is_left_alone_if_there_is_a_generator(self):
        images, masks = batch()
        state = torch.get_rng_state()
        ALL(images, masks, generator=torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), state)

    def test_is_left_alone_by_the_transform(self):
        images, masks = batch()
        parameters = ALL.draw(images)
        state = torch.get_rng_state()
        found = [ALL.transform(images, masks, parameters) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state)
        assert_identical(found[0][0], found[1][0])

    def test_advances_from_call_to_call(self):
        images, masks = batch()
        assert not torch.equal(ALL(images, masks)[0], ALL(images, masks)[0])

    def test_draws_the_same_whatever_the_images_hold(self):
        draws = []
        for images in (torch.zeros(8, 3, 9, 7), torch.full((8, 3, 9, 7), math.nan, dtype=torch.float64)):
            torch.manual_seed(1)
            draws.append(ALL.draw(images))
        assert all(torch.equal(*pair) for pair in zip(*draws, strict=True))


class TestBatch:
    @pytest.mark.parametrize(("size", "height", "width"), [(6, 24, 20), (5, 256, 260), (3, 500, 430)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_gives_each_image_what_it_gets_alone(self, size, height, width, masked):
        images, masks = batch(size, height=height, width=width)
        where = torch.arange(size) % 3 != 1 if masked else None
        parameters = ALL.draw(images)
        found, found_masks = ALL.transform(images, masks, parameters, where)
        for i in range(size):
            row = slice(i, i + 1)
            drawn = type(parameters)(*(p[row] for p in parameters))
            alone, mask = ALL.transform(images[row], masks[row], drawn, None if where is None else where[row])
            # With several threads, the mean of a single image is summed in another order.
            torch.testing.assert_close(found[row], alone, rtol=0, atol=2e-6)
            assert torch.equal(found_masks[row], mask)

    def test_gets_the_same_from_any_number_of_threads(self):
        images, masks = batch(3, height=200, width=260)
        parameters = ALL.draw(images)
        wanted, wanted_masks = ALL.transform(images, masks, parameters)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - min(threads, 2))
            again = ALL.draw(images, torch.Generator().manual_seed(0))
            found, found_masks = ALL.transform(images, masks, parameters)
        finally:
            torch.set_num_threads(threads)
        # The mean of an image is summed in another order.
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        assert torch.equal(found_masks, wanted_masks)
        for one, other in zip(again, ALL.draw(images, torch.Generator().manual_seed(0)), strict=True):
            assert torch.equal(one, other)

    def test_gets_the_same_row_by_row_and_all_at_once(self, monkeypatch):
        images, masks = batch(40, height=60, width=50)
        where = torch.arange(40) % 3 != 1
        parameters = ALL.draw(images)
        wanted, wanted_masks = ALL.transform(images, masks, parameters, where)
        read_no_value(monkeypatch)
        found, found_masks = ALL.transform(images, masks, parameters, where)
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
        assert_identical(found[~where], wanted[~where])
        assert torch.equal(found_masks, wanted_masks)

    def test_stays_in_range(self):
        images, masks = batch(64)
        images[::2] = images[::2].round()
        found, _ = StrongAugment(jitter=(1, 1, 1, 0.5))(images, masks)
        assert found.min() >= -1e-6
        assert found.max() <= 1 + 1e-6

    def test_gets_one_ignored_rectangle_of_noise_each(self):
        images, masks = batch(64)
        found, found_masks = StrongAugment(**OFF | {"cutout": Cutout(p=0.7)})(images, masks)
        noisy = (found != images).any(1)
        assert torch.equal(noisy, found_masks == 255)
        assert torch.equal(found_masks[~noisy], masks[~noisy])
        for rectangle in noisy:
            rows, columns = rectangle.any(1), rectangle.any(0)
            assert rectangle.sum() == rows.sum() * columns.sum()
            assert (rows.int().diff() != 0).sum() <= 2
            assert (columns.int().diff() != 0).sum() <= 2


class Operations(TorchDispatchMode):
    """Notes what runs, and on which devices tensors come about (a number may do so anywhere)."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split("::")[1].split(".")[0])
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(result)
        self.devices |= {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        return result


class TestOneGraph:
    where = torch.tensor([True, False, True, True])

    def compare(self, compiled, strong, channels=3):
        for where in (self.where, None):
            images, masks = batch(4, channels)
            parameters = strong.draw(images)
            wanted, wanted_masks = strong.transform(images, masks, parameters, where)
            found, found_masks = compiled(images, masks, parameters, where)
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
            assert torch.equal(found_masks, wanted_masks)
            if where is not None:
                assert_identical(found[~where], images[~where])

    @pytest.mark.parametrize("strong", [ALL, StrongAugment(**OFF), StrongAugment(cutout=None)])
    @pytest.mark.parametrize("channels", [3, 4])
    def test_is_captured_whole(self, strong, channels):
        torch.compiler.reset()
        compiled = torch.compile(strong.transform, fullgraph=True, backend="aot_eager")
        self.compare(compiled, strong, channels)

    def test_serves_whatever_is_drawn(self):
        """No value of the parameters, images or masks decides what runs: compiled once, and never again."""
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(ALL.transform, fullgraph=True, backend=counter)
        for _ in range(5):
            images, masks = batch(4)
            compiled(images, masks, ALL.draw(images), torch.rand(4) < 0.5)
        assert counter.frame_count == 1

    @pytest.mark.slow
    @pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
    def test_compiles(self):
        torch.compiler.reset()
        self.compare(torch.compile(ALL.transform, fullgraph=True), ALL)

    def test_gathers_no_rows_and_reads_no_value(self):
        images, masks, where = (x.to("meta") for x in (*batch(4), self.where))
        with Operations() as operations:
            parameters = ALL.draw(images)
            ALL.transform(images, masks, parameters, where)
        assert {"where", "addcmul", "rand"} <= operations.names
        assert not operations.names & {
            *(
                "_local_scalar_dense",
                "item",
                "is_nonzero",
                "equal",
                "nonzero",
                "masked_select",
                "unique_dim",
                "_unique2",
            ),
            *(
                "index",
                "index_select",
                "index_put",
                "index_put_",
                "index_copy",
                "index_copy_",
                "take",
                "masked_scatter",
            ),
        }

    def test_needs_no_values_and_no_tensors_of_the_host(self):
        """On the meta device there are no values to read."""
        images, masks, where = (x.to("meta") for x in (*batch(4), self.where))
        with Operations() as operations:
            found, found_masks = ALL(images, masks, where)
        assert operations.devices == {"meta"}
        assert (found.shape, found.dtype) == (images.shape, images.dtype)
        assert (found_masks.shape, found_masks.dtype) == (masks.shape, masks.dtype)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_waits_for_no_gpu(self):
        images, masks = (x.cuda() for x in batch(4))
        where = self.where.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, _ = ALL.transform(images, masks, ALL.draw(images), where)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found[1], images[1])


@pytest.mark.usefixtures("way")
class TestInversion:
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_inverts_the_share_that_is_asked_for_and_nothing_else(self, channels):
        strong = StrongAugment(**OFF | {"invert_p": 0.3})
        images, masks = batch(size=400, channels=channels, height=3, width=4)
        parameters = strong.draw(images)
        found, found_masks = strong.transform(images, masks, parameters)
        assert_identical(found[~parameters.invert], images[~parameters.invert])
        assert torch.equal(found[parameters.invert], 1 - images[parameters.invert])
        assert torch.equal(found_masks, masks)
        assert 0.2 < parameters.invert.float().mean() < 0.4

    def test_leaves_other_rows_alone(self):
        images, masks = batch()
        where = torch.arange(8) % 2 == 0
        found, _ = StrongAugment(**OFF | {"invert_p": 1})(images, masks, where)
        assert_identical(found[~where], images[~where])
        assert torch.equal(found[where], 1 - images[where])

    def test_changes_no_other_draw(self):
        images, _ = batch()
        drawn = []
        for p in (0, 0.5):
            torch.manual_seed(3)
            drawn.append(StrongAugment(invert_p=p).draw(images))
        for one, other in zip(drawn[0][:-1], drawn[1][:-1], strict=True):
            assert torch.equal(one, other)


class TestModule:
    def test_has_the_settings_of_the_paper(self):
        strong = StrongAugment()
        assert strong.jitter == (0.5, 0.5, 0.5, 0.25)
        assert (strong.jitter_p, strong.gray_p, strong.blur_p, strong.blur_sigma) == (0.8, 0.2, 0.5, (0.1, 2.0))
        assert strong.cutout == Cutout(p=0.5, area=(0.02, 0.4), ratio=(0.3, 1 / 0.3), ignore_index=255)
        assert strong.invert_p == 0
        assert strong.draw(torch.rand(2, 3, 8, 8)).invert is None

    def test_holds_no_state(self):
        assert not ALL.state_dict()
        assert not list(ALL.parameters())

    def test_survives_pickling(self):
        images, masks = batch()
        parameters = ALL.draw(images)
        again = pickle.loads(pickle.dumps(ALL))
        assert_identical(again.transform(images, masks, parameters)[0], ALL.transform(images, masks, parameters)[0])

    def test_tells_its_settings(self):
        assert "blur_p=0.8" in repr(ALL)
        assert "Cutout(p=0.8" in repr(ALL)


class TestRefuses:
    @pytest.mark.parametrize(
        "jitter",
        [
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5, 0.6),
            (-0.1, 0.5, 0.5, 0.25),
            (0.5, math.inf, 0.5, 0.25),
            (math.nan, 0.5, 0.5, 0.25),
            (0.5, 0.5, math.nan, 0.25),
            (0.5, 0.5, 0.5, math.nan),
            0.5,
        ],
    )
    def test_strengths(self, jitter):
        with pytest.raises(ValueError, match=r"jitter is .*; expected brightness, contrast and .* hue in \[0, 0.5\]"):
            StrongAugment(jitter=jitter)

    @pytest.mark.parametrize("name", ["jitter_p", "gray_p", "blur_p", "invert_p"])
    @pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
    def test_probabilities(self, name, p):
        with pytest.raises(ValueError, match=rf"{name} is {p}; expected a probability in \[0, 1\]"):
            StrongAugment(**{name: p})

    @pytest.mark.parametrize("sigma", [(0, 2), (2, 1), (-1, 1), (1, math.inf), (math.nan, 1), (1,)])
    def test_sigmas(self, sigma):
        with pytest.raises(ValueError, match=r"blur_sigma is \(.*; expected \(low, high\) with low <= high"):
            StrongAugment(blur_sigma=sigma)

    @pytest.mark.parametrize("cutout", [True, 0.5, "default"])
    def test_other_cutouts(self, cutout):
        with pytest.raises(TypeError, match=rf"cutout is {type(cutout).__name__}; expected a stseg\.Cutout or None"):
            StrongAugment(cutout=cutout)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"images": lambda x: (x * 255).byte()}, TypeError, r"images are torch\.uint8; expected float"),
            ({"masks": torch.Tensor.float}, TypeError, r"masks are torch\.float32; expected an integer"),
            ({"masks": torch.Tensor.bool}, TypeError, r"masks are torch\.bool; expected an integer"),
            ({"images": lambda x: x[0]}, ValueError, r"\(3, 24, 20\) and masks \(8, 24, 20\); expected"),
            ({"masks": lambda x: x[:, None]}, ValueError, r"masks \(8, 1, 24, 20\); expected \(B, C, H, W\) and"),
            ({"masks": lambda x: x[:7]}, ValueError, r"\(8, 3, 24, 20\) and masks \(7, 24, 20\); expected"),
            ({"images": lambda x: x.permute(0, 2, 3, 1)}, ValueError, r"\(8, 24, 20, 3\) and masks"),
            ({"images": lambda x: x[:, :0]}, ValueError, r"\(8, 0, 24, 20\) .* with pixels"),
            ({"where": torch.Tensor.int}, TypeError, r"where is torch\.int32; expected bool"),
            ({"where": lambda x: x[:5]}, ValueError, r"where has shape \(5,\); expected \(8,\)"),
            ({"where": lambda x: x[:, None]}, ValueError, r"where has shape \(8, 1\); expected \(8,\)"),
        ],
    )
    @pytest.mark.parametrize("transform", [False, True])
    def test_batches(self, change, error, message, transform):
        images, masks = batch()
        arguments = {"images": images, "masks": masks, "where": torch.ones(8, dtype=torch.bool)}
        parameters = {"parameters": ALL.draw(images)} if transform else {}
        arguments |= {name: function(arguments[name]) for name, function in change.items()}
        with pytest.raises(error, match=message):
            (ALL.transform if transform else ALL)(**arguments, **parameters)

    def test_masks_that_cannot_hold_the_ignore_index(self):
        images, masks = batch()
        with pytest.raises(ValueError, match=r"ignore_index 255 of the cutout does not fit into masks of torch\.int8"):
            StrongAugment()(images, masks.to(torch.int8))

    def test_parameters_of_another_batch(self):
        images, masks = batch()
        with pytest.raises(ValueError, match="parameters are for 5 images, but there are 8"):
            ALL.transform(images, masks, ALL.draw(images[:5]))
        with pytest.raises(ValueError, match=r"shape \(8, 3, 23, 20\), not \(8, 3, 24, 20\)"):
            ALL.transform(images, masks, ALL.draw(images[:, :, 1:]))
