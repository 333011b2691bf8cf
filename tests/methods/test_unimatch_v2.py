from __future__ import annotations

import itertools

import naive
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from test_fixmatch import FixedBox
from tester import MethodTester, Network, Plain, batch, images, pairs, rows_seen
from torch import Tensor, nn

import stseg
from stseg import Segmenter, TrainConfig, WeakAugment
from stseg.methods import UniMatchV2
from stseg.models.state import cpu_state
from stseg.modules import complementary_dropout


def with_other_teacher(method, seed=1):
    method.teacher.model.load_state_dict({f"network.{k}": v for k, v in Plain(seed).state_dict().items()})
    return method


def dpt(**options) -> nn.Module:
    """The DPT of smp on a small ViT."""
    return smp.DPT(
        options.pop("encoder_name", "tu-test_vit"),
        encoder_weights=None,
        classes=3,
        decoder_intermediate_channels=(8, 8, 8, 8),
        decoder_fusion_channels=8,
        **options,
    )


class TokenHead(nn.Module):
    """A ViT with patches of 14 that returns tokens, and a head with one convolution."""

    def __init__(self, *, by_method: bool = False, **options) -> None:
        super().__init__()
        settings = {"patch_size": 14, "img_size": 56, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
        settings |= {"global_pool": "", "dynamic_img_size": True, **options}
        self.backbone = timm.create_model("vit_tiny_patch16_224", **settings)
        self.head = nn.Conv2d(24, 3, 1)
        self.by_method = by_method

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x) if self.by_method else self.backbone(x)
        tokens = tokens[:, self.backbone.num_prefix_tokens :]
        return self.head(tokens.mT.unflatten(2, (x.shape[2] // 14, x.shape[3] // 14)))


class TestUniMatchV2(MethodTester):
    def make(self):
        return UniMatchV2(Network(), threshold=0.4)

    def plain(self):
        return with_other_teacher(UniMatchV2(Plain(), threshold=0.4, dropout=0.0, strong=None, mix=None))

    @pytest.mark.parametrize("threshold", [0.0, 0.37, 1.0])
    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_loss_is_the_formula(self, threshold, share):
        method, one = UniMatchV2(Plain(), threshold=threshold, dropout=share, strong=None, mix=FixedBox()), batch(3)
        network = with_other_teacher(method).student.network
        mixed = torch.from_numpy(naive.paste(FixedBox.box, one.unlabeled.numpy()))
        torch.manual_seed(4)  # the split of the channels is the only thing drawn
        (factors,) = complementary_dropout([torch.ones(6, 6, 1, 1)], share)
        with torch.no_grad():
            weak, labeled = Segmenter(Plain(1))(one.unlabeled).numpy(), method.student(one.images).numpy()
            normalized = method.student._normalized(torch.cat([mixed, mixed]))
            strong = network.head((network.encoder(normalized) * factors).relu()).numpy()
        label, confidence = naive.targets(weak)
        where = [naive.paste(FixedBox.box, x) for x in (label, confidence, one.valid.numpy())]
        supervised = naive.supervised(labeled, one.masks.numpy())
        first, second = (naive.consistency(z, *where, threshold) for z in (strong[:3], strong[3:]))
        torch.manual_seed(4)
        losses = method(one)
        assert float(losses.logged["supervised"]) == pytest.approx(supervised, rel=1e-5)
        assert float(losses.logged["strong"]) == pytest.approx((first + second) / 2, rel=1e-5)
        expected = (supervised + (first + second) / 2) / 2
        assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-5)

    def test_the_two_strong_views_are_drawn_apart(self):
        views = []

        def strong(images, masks, where):
            views.append(images + 0.1 * torch.rand(len(images), 1, 1, 1))
            return views[-1], masks

        UniMatchV2(Plain(), threshold=0.0, strong=strong, mix=None)(batch())
        assert len(views) == 2
        assert not torch.equal(*views)

    def test_the_student_sees_labeled_images_and_then_both_views_and_the_teacher_no_batch_statistics(self):
        method = UniMatchV2(Network(), strong=None, mix=None).train()
        seen = {name: rows_seen(getattr(method.student.network, name)) for name in ("encoder", "decoder")}
        teacher = rows_seen(method.teacher.model.network.encoder)
        before = cpu_state(method.teacher)
        method(batch(3)._replace(images=torch.rand(2, 3, 8, 8), masks=torch.zeros(2, 8, 8, dtype=torch.long)))
        assert seen == {"encoder": [2, 6], "decoder": [2, 6]}
        assert teacher == []
        assert all(torch.equal(value, before[name]) for name, value in cpu_state(method.teacher).items())
        assert method.teacher.model.network.encoder[1].training  # as before

    def test_without_a_confident_pixel_only_the_labels_teach(self):
        method = with_other_teacher(UniMatchV2(Plain(), threshold=1.0))
        losses = method(batch())
        assert losses.logged["strong"] == losses.logged["sure"] == 0
        losses.total.backward()
        plain = Plain()
        (nn.functional.cross_entropy(Segmenter(plain)(batch().images), batch().masks, ignore_index=255) / 2).backward()
        torch.testing.assert_close(method.student.network.head.weight.grad, plain.head.weight.grad)

    def test_the_gradient_of_the_strong_views_reaches_the_encoder_and_not_the_teacher(self):
        method = UniMatchV2(Network(), threshold=0.0).train()
        one = batch()
        method(one._replace(masks=torch.full_like(one.masks, 255))).total.backward()
        assert method.student.network.encoder[0].weight.grad.abs().sum() > 0
        assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())

    def test_weights_and_buffers_of_the_teacher_are_averages(self):
        method = UniMatchV2(Network(), decay=0.6)
        average = cpu_state(method.teacher.model)
        for step, decay in enumerate([0.0, 0.5, 0.6, 0.6]):
            for value in method.student.state_dict().values():
                value.add_(torch.rand_like(value)) if value.is_floating_point() else value.add_(1)
            method.after_step(batch(step=step))
            student = cpu_state(method.student)
            for name, value in cpu_state(method.teacher.model).items():
                if value.is_floating_point():
                    average[name] = decay * average[name] + (1 - decay) * student[name]
                    torch.testing.assert_close(value, average[name])
                else:
                    assert torch.equal(value, student[name])

    def test_the_decay_is_that_of_the_paper_from_step_249_on(self):
        decay_at = UniMatchV2(Plain()).teacher.decay_at
        assert (decay_at(0), decay_at(1), round(decay_at(248), 6), decay_at(249)) == (0, 0.5, 0.995984, 0.996)

    @pytest.mark.parametrize("deploy", ["teacher", "student"])
    def test_deploys_what_is_asked_for(self, deploy):
        method = UniMatchV2(Plain(), deploy=deploy)
        assert method.model is (method.student if deploy == "student" else method.teacher.model)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.5}, "threshold is 1.5; expected a probability"),
            ({"dropout": -1}, "dropout is -1; expected a probability"),
            ({"deploy": "both"}, "deploy is 'both'; expected 'teacher' or 'student'"),
        ],
    )
    def test_refuses_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            UniMatchV2(Plain(), **options)

    def test_names_the_network_without_a_backbone(self):
        with pytest.raises(stseg.NetworkError, match="Conv2d"):
            UniMatchV2(nn.Conv2d(3, 3, 1))(batch())


TRANSFORMERS = {
    "DPT": lambda: dpt(dynamic_img_size=True),
    "DPT without class token": lambda: dpt(
        dynamic_img_size=True, class_token=False, global_pool="avg", decoder_readout="ignore"
    ),
    "DINOv2, patches of 16": lambda: dpt(
        encoder_name="tu-vit_small_patch14_dinov2", patch_size=16, embed_dim=24, num_heads=2, dynamic_img_size=True
    ),
    "tokens": TokenHead,
    "tokens of registers": lambda: TokenHead(reg_tokens=2),
}
NETWORKS = {
    **TRANSFORMERS,
    "Unet": lambda: smp.Unet("tu-test_resnet", encoder_weights=None, classes=3),
    "DeepLabV3+": lambda: stseg.models.DeepLabV3Plus("test_resnet", num_classes=3),
}


class TestNetworks:
    @pytest.mark.parametrize(
        ("network", "size"), [*itertools.product(TRANSFORMERS, [28, 41, 64]), ("Unet", 41), ("DeepLabV3+", 41)]
    )
    def test_of_others_are_taken_at_any_size(self, network, size):
        method = UniMatchV2(NETWORKS[network](), threshold=0.0).train()
        losses = method(batch(2, size))
        losses.total.backward()
        assert all(value.isfinite() for value in losses.logged.values())
        assert method.eval().model(torch.rand(1, 3, size, size + 5)).shape == (1, 3, size, size + 5)

    # The DPT of smp uses neither the last norm nor the classifier of the ViT.
    @pytest.mark.filterwarnings("ignore:4 trainable parameters .*encoder.model.norm:stseg.NetworkWarning")
    @pytest.mark.parametrize("network", ["DPT", "tokens"])
    def test_with_a_transformer_are_trained_and_resumed(self, network, tmp_path):
        def train(**options):
            torch.manual_seed(0)
            method = UniMatchV2(NETWORKS[network](), threshold=0.0)
            config = TrainConfig.unimatch_v2(steps=3, batch_size=2, weak=WeakAugment(28), lr=1e-3, seed=1)
            unlabeled = images(5, seed=1, size=(40, 36))
            return stseg.fit(method, pairs(4), config, unlabeled=unlabeled, val=pairs(3), progress=False, **options)

        first, again, other = train(workdir=tmp_path), train(workdir=tmp_path), train()
        for name, value in cpu_state(first.model).items():
            assert torch.equal(value, cpu_state(again.model)[name])
            assert torch.equal(value, cpu_state(other.model)[name])
        assert 0 <= first.history[-1]["miou"] <= 1

    def test_with_a_transformer_of_one_size_take_that_size_alone(self):
        method = UniMatchV2(TokenHead(dynamic_img_size=False), threshold=0.0)
        assert method(batch(2, 56)).total.isfinite()
        with pytest.raises(stseg.NetworkError, match=r"cannot take an image of shape \(3, 70, 70\).*dynamic_img_size"):
            method(batch(2, 70))

    def test_of_smp_with_patches_of_14_are_refused(self):
        """Its decoder enlarges the patches by 3, not by 14 / 4, so that its levels do not fit."""
        network = dpt(encoder_name="tu-vit_small_patch14_dinov2", embed_dim=24, num_heads=2, dynamic_img_size=True)
        with pytest.raises(stseg.NetworkError, match=r"cannot take an image of shape \(3, 56, 56\).*in DPT"):
            UniMatchV2(network)(batch(2, 56))

    def test_whose_backbone_is_not_called_are_refused(self):
        with pytest.raises(stseg.NetworkError, match=r"VisionTransformer of .*TokenHead\) is not called as a module"):
            UniMatchV2(TokenHead(by_method=True))(batch(2, 28))

    def test_learn_at_the_rates_of_the_paper(self):
        method = UniMatchV2(NETWORKS["DPT"]())
        (optimizer,) = method.optimizers(TrainConfig.unimatch_v2())
        assert isinstance(optimizer, torch.optim.AdamW)
        base, head = optimizer.param_groups
        assert (base["lr"], base["weight_decay"], base["betas"]) == (5e-6, 0.01, (0.9, 0.999))
        assert head["lr"] == pytest.approx(2e-4)
        inside = {id(p) for p in method.student.network.encoder.parameters()}
        assert {id(p) for p in base["params"]} == inside
        assert len(base["params"]) + len(head["params"]) == len(list(method.student.parameters()))
