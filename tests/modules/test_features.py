from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stseg
from stseg.models import DeepLabV3Plus, backbone_of
from stseg.modules import (
    captured,
    changed_features,
    channel_dropout,
    complementary_dropout,
    deepest_features,
    map_features,
    perturbed_features,
    rewritten,
)

few = settings(max_examples=25, deadline=None)


class Plain(nn.Module):
    def __init__(self, features=lambda x: x, backbone="encoder"):
        super().__init__()
        self.name, self.features = backbone, features
        setattr(self, backbone, nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()))
        self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.head(self.norm(getattr(self, self.name)(x)))


@dataclass
class Output(OrderedDict):
    """Keeps its fields as items and as attributes, as the outputs of Hugging Face do."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple | None = None

    def __post_init__(self):
        for name in ("last_hidden_state", "hidden_states"):
            if getattr(self, name) is not None:
                super().__setitem__(name, getattr(self, name))

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class LikeHuggingFace(nn.Module):
    base_model_prefix = "segformer"

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 4, stride=4)

        def forward(self, pixel_values=None):
            maps = self.conv(pixel_values)
            return Output(last_hidden_state=maps.flatten(2).mT, hidden_states=(maps,))

    def __init__(self):
        super().__init__()
        self.segformer, self.head = self.Base(), nn.Conv2d(16, 5, 1)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.head(self.segformer(pixel_values=pixel_values).hidden_states[-1]))


class PlainViT(nn.Module):
    """Tokens of a ViT of timm, and one layer."""

    def __init__(self):
        super().__init__()
        settings = {"patch_size": 8, "img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
        self.backbone = timm.create_model("test_vit", num_classes=0, global_pool="", dynamic_img_size=True, **settings)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.head(self.backbone(x)[:, 1:].mT.unflatten(2, (x.shape[2] // 8, x.shape[3] // 8)))


NETWORKS = {
    "smp.Unet": lambda: smp.Unet("resnet18", encoder_weights=None, classes=5),
    "smp.FPN": lambda: smp.FPN("tu-mobilenetv3_small_050", encoder_weights=None, classes=5),
    "smp.DeepLabV3Plus": lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=5),
    "smp.DPT": lambda: smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=5, dynamic_img_size=True),
    "torchvision fcn": lambda: torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=5
    ),
    "torchvision deeplab": lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    ),
    "DeepLabV3Plus": lambda: DeepLabV3Plus("resnet18", num_classes=5),
    "one's own": Plain,
    "Hugging Face": LikeHuggingFace,
    "ViT": PlainViT,
}


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(0)
    return stseg.Segmenter(NETWORKS[request.param]()).eval()


class TestPerturbedFeatures:
    def test_give_clean_logits_and_those_of_perturbed_features(self, model):
        images = torch.rand(2, 3, 64, 64)
        backbone = backbone_of(model.network)

        def shifted(features):
            return map_features(lambda f: f if f.shape[1] == 3 else f + 1, features)

        with torch.no_grad():
            wanted = model(images)
            with rewritten(backbone, shifted):
                wanted_perturbed = model(images)
            with perturbed_features(model, lambda f: f + 1):
                clean, perturbed = model(images).chunk(2)
            after = model(images)
        torch.testing.assert_close(clean, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(perturbed, wanted_perturbed, rtol=1e-4, atol=1e-4)
        assert (perturbed - clean).abs().max() > 1e-3
        assert torch.equal(after, wanted)

    def test_run_the_backbone_once_and_the_rest_on_one_batch(self, model):
        images, seen = torch.rand(2, 3, 64, 64), []
        model(images)
        backbone = backbone_of(model.network)
        backbone.register_forward_hook(lambda module, inputs, output: seen.append(1))
        logits = model.train()
        with perturbed_features(model, partial(channel_dropout, p=0.5)):
            logits = model(images)
        assert logits.shape == (4, 5, 64, 64)
        assert len(seen) == 1
        logits[2:].square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())

    def test_reach_features_of_a_name(self):
        model = stseg.Segmenter(Plain(backbone="trunk"))
        with perturbed_features(model, torch.zeros_like, backbone="trunk.0"):
            clean, perturbed = model(torch.rand(2, 3, 8, 8)).chunk(2)
        assert perturbed.std((0, 2, 3)).max() < 1e-6
        assert clean.std((0, 2, 3)).max() > 1e-3

    def test_draw_nothing_while_the_wrapper_tries_sizes(self):
        calls = []
        model = stseg.Segmenter(Plain())
        with perturbed_features(model, lambda f: calls.append(len(f)) or f):
            model(torch.rand(2, 3, 9, 9))
        assert calls == [2]

    def test_leave_nothing_behind_even_after_an_error(self):
        model = stseg.Segmenter(Plain())
        with pytest.raises(KeyError), perturbed_features(model, torch.zeros_like):
            raise KeyError
        assert model(torch.rand(2, 3, 8, 8)).shape == (2, 5, 8, 8)
        assert not model.network.encoder._forward_hooks

    def test_of_a_network_without_a_known_backbone_need_its_name(self):
        model = stseg.Segmenter(Plain(backbone="trunk"))
        message = r"network \(Plain\), as it has no encoder or backbone; .* as in backbone='trunk'"
        with pytest.raises(stseg.NetworkError, match=message), perturbed_features(model, torch.zeros_like):
            pass
        with (
            pytest.raises(ValueError, match=r"backbone is 'stem'; the network \(Plain\)"),
            perturbed_features(model, torch.zeros_like, backbone="stem"),
        ):
            pass

    def test_of_a_bare_network_are_refused(self):
        with (
            pytest.raises(TypeError, match=r"the model is Plain; expected stseg\.Segmenter"),
            perturbed_features(Plain(), torch.zeros_like),
        ):
            pass

    @pytest.mark.parametrize(
        ("output", "came"),
        [
            (lambda x: SimpleNamespace(features=x), "returned SimpleNamespace for 2 images"),
            (lambda x: x.flatten(2).permute(2, 0, 1), r"returned tensors of the shapes \[\(64, 2, 3\)\] for 2 images"),
            (lambda x: [x, x.mean()], r"returned tensors of the shapes \[\(2, 3, 8, 8\), \(\)\] for 2 images"),
        ],
        ids=["no tensors", "tokens first", "a number"],
    )
    def test_need_features_with_a_row_for_each_image(self, output, came):
        class Backbone(nn.Module):
            def forward(self, x):
                return output(x)

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = Backbone()

            def forward(self, x):
                self.backbone(x)
                return x

        model = stseg.Segmenter(Odd(), stride=1)
        with (
            pytest.raises(
                stseg.NetworkError, match=f"Backbone of the network .Odd. {came}; expected features with a row"
            ),
            perturbed_features(model, torch.zeros_like),
        ):
            model(torch.rand(2, 3, 8, 8))

    def test_that_a_network_passes_by_are_an_error(self):
        class Direct(Plain):
            def forward(self, x):
                return self.head(self.norm(self.encoder.forward(x)))

        model = stseg.Segmenter(Direct())
        with (
            pytest.raises(stseg.NetworkError, match=r"Direct.*returned .*\(2, 5, 8, 8\).*expected 4 rows of logits"),
            perturbed_features(model, torch.zeros_like),
        ):
            model(torch.rand(2, 3, 8, 8))


def test_the_wrapper_still_wants_one_row_of_logits_for_each_image():
    model = stseg.Segmenter(Plain())
    with (
        rewritten(model.network.encoder, lambda f: torch.cat([f, f])),
        pytest.raises(stseg.NetworkError, match="expected float logits"),
    ):
        model(torch.rand(2, 3, 8, 8))


class TestHooks:
    def test_captured_collects_every_call_and_ends(self):
        network = Plain()
        with captured(network.encoder) as outputs:
            network(torch.rand(1, 3, 4, 4))
            network(torch.rand(2, 3, 4, 4))
        network(torch.rand(3, 3, 4, 4))
        assert [len(output) for output in outputs] == [1, 2]

    def test_hooks_reach_the_network_inside_a_compiled_one(self):
        compiled = []
        network = torch.compile(Plain(), backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
        model = stseg.Segmenter(network)
        images = torch.rand(2, 3, 8, 8)
        with captured(model.network.encoder) as outputs:
            model(images)
        assert len(outputs[-1]) == 2
        assert compiled == []
        model(images)
        assert len(compiled) == 1

    def test_rewritten_replaces_what_the_next_module_sees(self):
        network = Plain().eval()
        x = torch.rand(1, 3, 4, 4)
        with rewritten(network.encoder, lambda f: -f):
            found = network(x)
        torch.testing.assert_close(found, network.head(network.norm(-network.encoder(x))))

    def test_rewritten_refuses_a_change_without_a_result(self):
        network = Plain()
        with rewritten(network.encoder, lambda f: None), pytest.raises(TypeError, match="returned None"):
            network(torch.rand(1, 3, 4, 4))


class TestMapFeatures:
    def test_keeps_every_structure(self):
        Pair = namedtuple("Pair", "low high")
        x = torch.ones(2)
        features = [x, (x, None), Pair(x, 3), OrderedDict(out=x), Output(last_hidden_state=x, hidden_states=(x,))]
        found = map_features(lambda t: t + 1, features)
        assert [type(f) for f in found] == [type(f) for f in features]
        assert [f.tolist() for f in (found[0], found[1][0], found[2].low, found[3]["out"])] == [[2.0, 2.0]] * 4
        assert (found[1][1], found[2].high) == (None, 3)
        assert found[4].last_hidden_state is found[4]["last_hidden_state"]
        assert found[4].hidden_states[0].tolist() == [2.0, 2.0]
        assert features[4].last_hidden_state is x  # the input is left alone
        assert x.tolist() == [1.0, 1.0]


class TestChannelDropout:
    @few
    @given(st.sampled_from([(3, 40, 2, 3), (3, 5, 40), (3, 40)]), st.floats(0, 0.9), st.integers(0, 99))
    def test_zeroes_channels_of_each_image_and_scales_the_others(self, shape, p, seed):
        torch.manual_seed(seed)
        features = torch.rand(shape) + 1
        found = channel_dropout(features, p)
        channel = 2 if len(shape) == 3 else 1
        factor = (found / features).movedim(channel, 1).flatten(2) if len(shape) > 2 else (found / features)[..., None]
        assert torch.equal(factor.amax(2) == 0, factor.amin(2) == 0)  # a channel is zeroed whole
        kept = factor[factor != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))

    def test_draws_for_each_image_as_often_as_told(self):
        torch.manual_seed(0)
        for shape, where in (((50, 400, 2, 2), (2, 3)), ((50, 4, 400), (1,))):
            dropped = channel_dropout(torch.ones(shape), 0.3).sum(where) == 0
            assert dropped.float().mean() == pytest.approx(0.3, abs=0.02)
            assert len({tuple(row) for row in dropped.tolist()}) == 50

    def test_keeps_the_dtype_and_with_p_zero_every_bit(self):
        features = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
        assert torch.equal(channel_dropout(features, 0), features)
        assert channel_dropout(features, 0.5).dtype == torch.bfloat16
        assert not channel_dropout(features, 1).any()

    def test_refuses_other_shapes_and_what_is_no_probability(self):
        with pytest.raises(ValueError, match=r"features have shape \(3,\); expected maps"):
            channel_dropout(torch.ones(3), 0.5)
        with pytest.raises(ValueError, match=r"between 0 and 1"):
            channel_dropout(torch.ones(1, 3, 2, 2), 1.5)


class TestBackboneOf:
    @pytest.mark.parametrize("name", ["encoder", "backbone"])
    def test_finds_the_usual_names(self, name):
        network = Plain(backbone=name)
        assert backbone_of(network) is getattr(network, name)

    def test_finds_what_hugging_face_names_and_dotted_names(self):
        network = LikeHuggingFace()
        assert backbone_of(network) is network.segformer
        assert backbone_of(network, "segformer.conv") is network.segformer.conv

    def test_finds_nothing_where_there_is_nothing(self):
        assert backbone_of(nn.Conv2d(3, 2, 1)) is None
        with pytest.raises(ValueError, match="has no such submodule"):
            backbone_of(nn.Conv2d(3, 2, 1), "encoder")


class TestDeepestFeatures:
    class Levels(nn.Module):
        """A backbone that returns the image and three levels, two of them of one size."""

        def __init__(self, wrap=list):
            super().__init__()
            self.wrap = wrap
            self.one, self.two = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 5, 2, stride=2)
            self.three = nn.Conv2d(5, 6, 1)

        def forward(self, x):
            one = self.one(x)
            two = self.two(one)
            return self.wrap([x, one, two, self.three(two)])

    class Decoded(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone, self.head, self.up = backbone, nn.Conv2d(6, 2, 1), nn.Upsample(scale_factor=4)

        def forward(self, x):
            found = self.backbone(x)
            return self.up(self.head([*(found.values() if isinstance(found, dict) else found)][-1]))

    @pytest.mark.parametrize("wrap", [list, tuple, lambda maps: {str(i): each for i, each in enumerate(maps)}])
    def test_are_the_last_of_the_smallest_and_cover_the_padded_image(self, wrap):
        model = stseg.Segmenter(self.Decoded(self.Levels(wrap)))
        with deepest_features(model) as found:
            logits = model(torch.rand(2, 3, 9, 14))
            model(torch.rand(1, 3, 8, 8))
        assert logits.shape == (2, 2, 9, 14)
        assert [(tuple(each.maps.shape), each.size) for each in found] == [
            ((2, 6, 3, 4), (12, 16)),
            ((1, 6, 2, 2), (8, 8)),
        ]
        assert found[0].maps.requires_grad
        model(torch.rand(1, 3, 8, 8))
        assert len(found) == 2

    def test_reach_into_a_compiled_network(self):
        network = self.Decoded(self.Levels())
        model = stseg.Segmenter(torch.compile(network, backend="eager"))
        with deepest_features(model) as found:
            model(torch.rand(2, 3, 8, 8))
        assert len(found) == 1

    def test_are_taken_from_a_submodule_by_name(self):
        model = stseg.Segmenter(self.Decoded(self.Levels()))
        with deepest_features(model, features="backbone.one") as found:
            model(torch.rand(2, 3, 8, 8))
        assert found[0].maps.shape == (2, 4, 4, 4)

    def test_name_the_network_that_has_none(self):
        with (
            pytest.raises(stseg.NetworkError, match=r"\(Conv2d\), as it has no"),
            deepest_features(stseg.Segmenter(nn.Conv2d(3, 2, 1))),
        ):
            pass
        with pytest.raises(TypeError, match="the model is Conv2d"), deepest_features(nn.Conv2d(3, 2, 1)):
            pass

    def test_name_what_is_not_called_as_a_module(self):
        network = self.Decoded(self.Levels())
        network.backbone, levels = nn.Identity(), network.backbone
        network.forward = lambda x: network.up(network.head(levels(x)[-1]))
        model = stseg.Segmenter(network)
        with (
            pytest.raises(stseg.NetworkError, match=r"the Identity of the network .* is not called as a module"),
            deepest_features(model),
        ):
            model(torch.rand(2, 3, 8, 8))

    def test_name_what_returns_no_maps(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.head = nn.Flatten(2), nn.Conv2d(3, 2, 1)

            def forward(self, x):
                return self.head(self.encoder(x).view(x.shape))

        model = stseg.Segmenter(Tokens())
        with (
            pytest.raises(stseg.NetworkError, match=r"the Flatten of the network \(Tokens\) returned no map"),
            deepest_features(model),
        ):
            model(torch.rand(2, 3, 8, 8))


class TestComplementaryDropout:
    def test_gives_every_channel_to_one_of_two_views(self):
        """As in the paper on a batch of 4: 2 images are untouched, the others' views add up to twice the features."""
        features = torch.rand(8, 50, 3, 4) + 1
        (found,) = complementary_dropout([features])
        factors = found / features
        assert all(factors[i, c].std() < 1e-6 for i in range(8) for c in range(50))  # one for all pixels
        first, second = factors[:, :, 0, 0].split(4)
        torch.testing.assert_close(first + second, torch.full((4, 50), 2.0))
        untouched = [i for i in range(4) if torch.allclose(first[i], torch.ones(50))]
        assert len(untouched) == 2
        for i in set(range(4)) - set(untouched):
            assert {round(float(v)) for v in first[i]} == {0, 2}
        split = [i for i in range(4) if i not in untouched]
        assert not torch.allclose(first[split[0]], first[split[1]])

    @pytest.mark.parametrize(
        ("rows", "share", "split"),
        [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (5, 0.5, 3), (4, 0, 0), (4, 1, 4), (4, 0.3, 2)],
    )
    def test_splits_a_share_of_the_images_rounded_up(self, rows, share, split):
        (found,) = complementary_dropout([torch.ones(2 * rows, 40)], share)
        changed = (found != 1).any(1)
        assert torch.equal(*changed.chunk(2))
        assert int(changed.sum()) == 2 * split

    def test_splits_tokens_maps_and_vectors_of_equal_width_alike(self):
        maps, tokens, vectors = complementary_dropout(
            [torch.ones(6, 30, 2, 2), torch.ones(6, 5, 30), torch.ones(6, 30)], share=1.0
        )
        for token in range(5):
            assert torch.equal(tokens[:, token], maps[:, :, 0, 0])
        assert torch.equal(vectors, maps[:, :, 1, 1])

    def test_splits_levels_of_other_widths_independently_in_the_same_images(self):
        one, other = complementary_dropout([torch.ones(8, 64, 1, 1), torch.ones(8, 65, 1, 1)])
        assert not torch.equal(one[:, :64], other[:, :64])
        assert torch.equal((one != 1).any(1), (other != 1).any(1))

    def test_draws_channels_and_images_evenly(self):
        count, untouched = torch.zeros(10), torch.zeros(4)
        for _ in range(400):
            first = complementary_dropout([torch.ones(8, 10)])[0][:4]
            count += (first == 2).sum(0)
            untouched += (first == 1).all(1)
        assert (count / 800 - 0.5).abs().max() < 0.08
        assert (untouched / 400 - 0.5).abs().max() < 0.11

    def test_keeps_dtype_and_gradient(self):
        features = torch.rand(4, 8, 3, dtype=torch.bfloat16, requires_grad=True)
        (found,) = complementary_dropout([features], 1.0)
        assert found.dtype == torch.bfloat16
        found.sum().backward()
        assert set(features.grad.flatten().tolist()) == {0.0, 2.0}

    def test_of_nothing_is_nothing(self):
        assert complementary_dropout([]) == []

    @pytest.mark.parametrize("shapes", [[(3, 4)], [(4, 3), (2, 3)], [(2, 3, 4, 5, 6)], [(2,)]])
    def test_refuses_what_is_not_two_views(self, shapes):
        with pytest.raises(ValueError, match=r"features have the shapes .*; expected maps \(2B, C, H, W\)"):
            complementary_dropout([torch.zeros(shape) for shape in shapes])

    def test_refuses_other_shares(self):
        with pytest.raises(ValueError, match="share is 2"):
            complementary_dropout([torch.zeros(2, 3)], 2)


class TestChangedFeatures:
    def test_change_all_but_the_image(self, model):
        images = torch.rand(2, 3, 64, 64)

        def shifted(features):
            return map_features(lambda f: f if f.shape[1] == 3 else f + 1, features)

        with torch.no_grad():
            wanted = model(images)
            with rewritten(backbone_of(model.network), shifted):
                wanted_changed = model(images)
            with changed_features(model, lambda features: [f + 1 for f in features]):
                changed = model(images)
            after = model(images)
        assert torch.equal(changed, wanted_changed)
        assert torch.equal(after, wanted)
        assert not torch.equal(changed, wanted)

    def test_reach_the_network_inside_a_compiled_one(self):
        model = stseg.Segmenter(torch.compile(Plain(), backend="eager"))
        images = torch.rand(2, 3, 8, 8)
        with torch.no_grad():
            before = model(images)
            with changed_features(model, lambda features: [0 * f for f in features]):
                changed = model(images)
        assert changed.std((0, 2, 3)).max() < 1e-6
        assert before.std((0, 2, 3)).max() > 1e-3

    def test_of_another_number_are_refused(self):
        model = stseg.Segmenter(Plain())
        with (
            pytest.raises(ValueError, match="returned 0 features; expected 1"),
            changed_features(model, lambda features: []),
        ):
            model(torch.rand(2, 3, 8, 8))

    def test_leave_nothing_behind_even_after_an_error(self):
        model = stseg.Segmenter(Plain())
        with pytest.raises(KeyError), changed_features(model, list):
            raise KeyError
        assert not model.network.encoder._forward_hooks
        assert not model._forward_hooks

    def test_need_a_backbone_that_is_found_and_called(self):
        with (
            pytest.raises(stseg.NetworkError, match="as in backbone='trunk'"),
            changed_features(stseg.Segmenter(Plain(backbone="trunk")), list),
        ):
            pass
        with (
            pytest.raises(TypeError, match=r"the model is Plain; expected stseg\.Segmenter"),
            changed_features(Plain(), list),
        ):
            pass

        class Direct(Plain):
            def forward(self, x):
                return self.head(self.encoder.forward(x))

        model = stseg.Segmenter(Direct())
        with (
            pytest.raises(stseg.NetworkError, match=r"Sequential of the network \(Direct\) is not called as a module"),
            changed_features(model, list),
        ):
            model(torch.rand(2, 3, 8, 8))
