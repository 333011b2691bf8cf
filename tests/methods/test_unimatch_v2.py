from __future__ import annotations

import naive
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from tester import MethodTester, Network, Plain, batch, rows_seen
from torch import nn

import stseg
from stseg.methods import UniMatchV2
from stseg.models.state import cpu_state
from stseg.modules import captured, complementary_dropout


class TestUniMatchV2(MethodTester):
    def make(self):
        return UniMatchV2(Network())

    def plain(self):
        return UniMatchV2(Plain(), strong=None, mix=None, untouched=1.0)

    @pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
    def test_loss_is_the_formula(self, threshold):
        method = UniMatchV2(Plain(), strong=None, mix=None, untouched=0.5, threshold=threshold)
        method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed=1).state_dict().items()})
        one = batch(4)
        torch.manual_seed(4)
        left = torch.randperm(4)[:2].tolist()
        factor = 2 * torch.randint(2, (4, 6)).float()
        factor[left] = 1
        net = method.student.network
        with torch.no_grad(), captured(net.encoder) as features:
            labeled = method.student(one.images).numpy()
            method.student(one.unlabeled)
            views = [net.head((features[-1] * f[:, :, None, None]).relu()).numpy() for f in (factor, 2 - factor)]
            teacher = method.teacher(one.unlabeled).numpy()
        label, confidence = naive.targets(teacher)
        strong = sum(naive.consistency(v, label, confidence, one.valid.numpy(), threshold) for v in views) / 2
        supervised = naive.supervised(labeled, one.masks.numpy())
        torch.manual_seed(4)
        losses = method(one)
        assert float(losses.logged["strong"]) == pytest.approx(strong, rel=1e-5)
        assert float(losses.total.detach()) == pytest.approx((supervised + strong) / 2, rel=1e-5)

    def test_the_teacher_predicts_in_evaluation_mode_and_averages_its_statistics(self):
        method = self.make().train()
        seen = [rows_seen(m.network.encoder) for m in (method.student, method.teacher.model)]
        method(batch(3)).total.backward()
        assert seen == [[3, 6], []]
        assert all(p.grad is None for p in method.teacher.parameters())
        student, before = cpu_state(method.student), cpu_state(method.teacher.model)
        method.after_step(batch(step=1))
        for name, value in cpu_state(method.teacher.model).items():
            expected = (before[name] + student[name]) / 2 if value.is_floating_point() else student[name]
            torch.testing.assert_close(value, expected)

    def test_deploys_the_teacher_unless_told_otherwise(self):
        method = UniMatchV2(Plain())
        assert method.model is method.teacher.model
        assert UniMatchV2(net := Plain(), deploy="student").model.network is net

    def test_without_a_confident_pixel_only_labels_count(self):
        losses = UniMatchV2(Plain(), threshold=1.0)(batch())
        assert losses.total.detach() == losses.logged["supervised"] / 2

    @pytest.mark.parametrize("options", [{"untouched": 1.2}, {"threshold": -1}, {"deploy": "both"}, {"decay": 3}])
    def test_mistakes_are_named(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            UniMatchV2(Plain(), **options)


class TestDropout:
    """Complementary, on features of any kind."""

    def doubled(self, shapes):
        method = UniMatchV2(Plain())
        torch.manual_seed(0)
        drop = method._dropout(4, torch.device("cpu"))
        return [drop(torch.ones(shape)) for shape in shapes]

    def test_gives_each_channel_to_one_view_but_for_half_of_the_images(self):
        maps, tokens, vectors, others = self.doubled([(8, 16, 3, 3), (8, 5, 16), (8, 16), (8, 12, 2, 2)])
        first, second = maps.chunk(2)
        assert torch.equal(first + second, torch.full_like(first, 2))
        untouched = (first == 1).flatten(1).all(1)
        assert int(untouched.sum()) == 2
        assert set(first[~untouched].unique().tolist()) == {0.0, 2.0}
        assert (first.amax((2, 3)) == first.amin((2, 3))).all()  # whole channels
        assert torch.equal(tokens.amax(1), maps.amax((2, 3)))  # shared by features of equal width
        assert torch.equal(vectors, maps.amax((2, 3)))
        assert torch.equal((others.chunk(2)[0] == 1).flatten(1).all(1), untouched)

    @pytest.mark.parametrize("shape", [(8,), (7, 16), (8, 15, 2, 2), (8, 16, 2), (8, 16, 2, 2, 2)])
    def test_refuses_other_shapes(self, shape):
        with pytest.raises(ValueError, match=r"features have shape .* and factor \(4, 16\)"):
            complementary_dropout(torch.ones(shape), torch.ones(4, 16))


class TinyViT(nn.Module):
    """A plain transformer of timm with a linear head on its tokens."""

    def __init__(self):
        super().__init__()
        self.encoder = timm.models.VisionTransformer(
            img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
        )
        self.encoder.forward = self.encoder.forward_features
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        tokens = self.encoder(x)[:, 1:]
        height, width = x.shape[-2] // 14, x.shape[-1] // 14
        return self.head(tokens.mT.reshape(len(x), -1, height, width))


def tiny_dpt():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return smp.DPT("tu-test_vit", encoder_weights=None, encoder_depth=4, classes=3, dynamic_img_size=True)


class TestTransformers:
    @pytest.mark.parametrize("size", [28, 42, 37])
    def test_of_timm_are_trained_at_any_size(self, size):
        torch.manual_seed(0)
        method = UniMatchV2(TinyViT(), threshold=0.3)
        weak = stseg.WeakAugment(size)
        config = stseg.TrainConfig.unimatch_v2(steps=3, epochs=None, batch_size=2, weak=weak, head_lr_factor=10)
        pairs = [(torch.rand(3, 40, 50), torch.randint(3, (40, 50)).byte()) for _ in range(3)]
        before = method.student.network.encoder.blocks[0].attn.qkv.weight.detach().clone()
        result = stseg.fit(method, pairs, config, unlabeled=[image for image, _ in pairs], progress=False)
        assert not torch.equal(method.student.network.encoder.blocks[0].attn.qkv.weight, before)
        assert result.model(torch.rand(1, 3, 45, 31)).shape == (1, 3, 45, 31)
