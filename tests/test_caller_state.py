"""Nothing that a caller hands in is changed: tensors, containers, networks and random generators."""

import copy
import inspect
import random
import warnings
from contextlib import contextmanager
from functools import partial

import albumentations
import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image
from small import Stopped, network, pairs
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

import stseg
from stseg import functional as F
from stseg.augment import (
    BoxMix,
    CropPair,
    as_batch_augmentation,
    as_pair_transform,
    from_albumentations,
    from_kornia,
    from_torchvision,
    strong_view,
)
from stseg.data import (
    ClassMap,
    FilePair,
    ListedFiles,
    MixedDataset,
    NamedDataset,
    SegmentationFolder,
    SyntheticScenes,
    split_ids,
)
from stseg.methods import (
    CPS,
    DCC,
    ECS,
    S4GAN,
    ST,
    U2PL,
    AdvSSL,
    ClassMix,
    CutMixSeg,
    FixMatch,
    Labeling,
    MeanTeacher,
    STPlusPlus,
    Supervised,
    UniMatch,
    UniMatchV2,
    create_method,
)
from stseg.models import DeepLabV2, DeepLabV3Plus, PSPNet, as_segmenter, backbone_of, create_network
from stseg.modules import (
    EMA,
    ConvCritic,
    ImageCritic,
    Ring,
    captured,
    changed_features,
    channel_dropout,
    complementary_dropout,
    conv_critic,
    decoder_of,
    frozen,
    logits_and_features,
    map_features,
    perturbed_features,
    representation_head,
    rewritten,
)

CLASSES = 3
QUIET = {"num_classes": 2, "progress": False}

# --- what is compared


def pool():
    """Arguments by name; integers are below 256."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.rand, generator=generator)
    integers = partial(torch.randint, generator=generator)
    masks = integers(CLASSES, (4, 8, 10))
    masks[:, 0] = 255
    return {
        "images": draw(4, 3, 8, 10),
        "one_channel": draw(4, 1, 8, 10),
        "logits": 5 * draw(4, CLASSES, 8, 10),
        "others": 5 * draw(4, CLASSES, 8, 10),
        "scores": draw(4, 1, 8, 10),
        "masks": masks,
        "bytes_": masks.byte(),
        "classes": integers(CLASSES, (4, 8, 10)),
        "earlier": integers(CLASSES, (2, 4, 8, 10)),
        "where": draw(4, 8, 10) < 0.5,
        "rows": torch.tensor([True, False, True, False]),
        "weight": draw(4, 1, 1),
        "boxes": torch.tensor([[0, 1, 3, 5]] * 4),
        "matrix": draw(CLASSES, CLASSES).double(),
        "threshold": torch.tensor([0.1, 0.2, 0.3]),
        "total": draw(()),
        "count": torch.tensor(3.0),
        "noise": draw(4, 3, 8, 10),
        "image": draw(3, 12, 9),
        "bytes_image": integers(256, (3, 12, 9)).byte(),
        "mask": integers(CLASSES, (12, 9)).byte(),
        "tokens": draw(4, 6, 5),
        "vectors": draw(4, 5),
    }


def not_contiguous(x):
    return x if x.ndim < 2 else x.mT.contiguous().mT


def inside_a_larger_one(x):
    larger = x.new_zeros([side + 2 for side in x.shape])
    part = larger[tuple(slice(1, 1 + side) for side in x.shape)]
    part.copy_(x)
    return part


def of_a_read_only_array(x):
    array = x.numpy().copy()
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def of_one_row(x):
    """All rows are the same memory."""
    return x[:1].expand_as(x) if x.ndim and x.dtype != torch.bool else x


def with_gradients(x):
    return x.clone().requires_grad_() if x.is_floating_point() else x


KINDS = {
    "plain": torch.clone,
    "not contiguous": not_contiguous,
    "part of a larger one": inside_a_larger_one,
    "of a read-only array": of_a_read_only_array,
    "of one row": of_one_row,
    "with gradients": with_gradients,
}


def storage(x):
    return x.untyped_storage().data_ptr() if x.numel() else object()


def facts(x):
    """What must stay the same of a tensor; the version counts writes, also those that change no value."""
    whole = torch.tensor([], dtype=x.dtype).set_(x.detach().untyped_storage())
    return whole.clone(), x.dtype, x.shape, x.stride(), x.requires_grad, x.is_leaf, x._version, x.grad


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def tensors_in(value):
    leaves = tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def random_states():
    numpy = np.random.get_state()  # noqa: NPY002  the global one
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "random": random.getstate(),
    }


@contextmanager
def same_random_states(*, but=()):
    before = random_states()
    yield
    after = random_states()
    assert [name for name in before if before[name] != after[name] and name not in but] == []


@contextmanager
def same_tensors(*values):
    tensors = tensors_in(values)
    before = [facts(x) for x in tensors]
    yield
    for x, was in zip(tensors, before, strict=True):
        assert_same(was, facts(x))


def network_facts(model):
    """Modes, flags, hooks and values of a network and of all its parts."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        {name: (module.training, *(len(getattr(module, h)) for h in hooks)) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.device, p.grad is None) for name, p in model.named_parameters()},
        [id(x) for x in model.buffers()],
        {name: value.tolist() for name, value in model.state_dict().items()},
    )


@contextmanager
def same_networks(*models):
    before = [network_facts(model) for model in models]
    yield
    for model, was in zip(models, before, strict=True):
        assert network_facts(model) == was


def partly_frozen(seed=0, classes=2):
    """In training mode but for its batch normalization, whose parameters are frozen too."""
    found = network(seed, classes)
    found[1].eval().requires_grad_(False)
    return found


# --- functions of tensors, by the names of their arguments

STRONG = stseg.StrongAugment(jitter_p=1, gray_p=0.5, blur_p=0.7, cutout=stseg.Cutout(p=0.7))
NOTHING = stseg.StrongAugment(jitter_p=0, gray_p=0, blur_p=0, cutout=None)
ENTROPY = nn.CrossEntropyLoss(ignore_index=255)
CONVOLUTION = nn.Conv2d(3, CLASSES, 1)
CRITIC = ConvCritic(CLASSES)
DETECTOR = stseg.modules.FlawDetector(3 + CLASSES, width=4)
DECODER, ROTATION = stseg.modules.PixelShuffleDecoder(3, CLASSES), stseg.modules.RotationHead(CLASSES)
MIRRORED = albumentations.Compose([albumentations.HorizontalFlip(p=1)])

FUNCTIONAL = {
    "adversarial_loss": lambda scores, where: F.adversarial_loss(scores, real=True, where=where),
    "box_mask": lambda boxes: F.box_mask(boxes, 8, 10),
    "class_mask": lambda classes, vectors: F.class_mask(classes, vectors),
    "confident_share": lambda scores, where: F.confident_share(scores[:, 0], threshold=0.5, where=where),
    "confusion_matrix": lambda classes, masks: F.confusion_matrix(classes, masks, CLASSES, ignore_index=255),
    "connected_components": lambda where: F.connected_components(where),
    "consistency_loss": lambda logits, masks: F.consistency_loss(logits, masks),
    "consistency_target": lambda logits, where: F.consistency_target(logits, threshold=0.4, valid=where),
    "consistency_target, all valid": lambda logits: F.consistency_target(logits, threshold=0.0),
    "cross_entropy": lambda logits, masks: F.cross_entropy(logits, masks),
    "cross_entropy, weighted": lambda logits, masks, weight: F.cross_entropy(logits, masks, weight=weight),
    "directional_contrast": lambda vectors, tokens, rows: F.directional_contrast(
        vectors, tokens[:, 0], tokens[:, 1], labels=rows.long(), negative_labels=rows.long(), where=rows
    ),
    "entropy": lambda logits, where: F.entropy(logits, where=where),
    "expected_iou": lambda logits: F.expected_iou(logits),
    "feature_matching": lambda vectors, tokens: F.feature_matching(vectors, tokens[:, 0]),
    "flaw_target": lambda logits, masks: F.flaw_target(logits, masks),
    "boundary_region": lambda masks: F.boundary_region(masks, 2),
    "dice": lambda matrix: F.dice(matrix),
    "pixel_accuracy": lambda matrix: F.pixel_accuracy(matrix),
    "iou": lambda matrix: F.iou(matrix),
    "less_flawed_target": lambda logits, others, scores: F.less_flawed_target(
        logits, others, scores[:, 0], scores[:, 0].flip(0)
    ),
    "mean_certainty": lambda logits: F.mean_certainty(logits),
    "mean_confidence": lambda logits: F.mean_confidence(logits),
    "mean_iou": lambda classes, masks: F.mean_iou(classes, masks, CLASSES, ignore_index=255),
    "mean_margin": lambda logits: F.mean_margin(logits),
    "mean_over_processes": lambda total, count: F.mean_over_processes(total, count),
    "ohem_cross_entropy": lambda logits, masks: F.ohem_cross_entropy(logits, masks, min_kept=20),
    "one_hot": lambda classes: F.one_hot(classes, CLASSES),
    "paste": lambda where, images, noise: F.paste(where, images, noise),
    "paste, masks": lambda where, masks, classes: F.paste(where, masks, classes),
    "pixel_agreement": lambda earlier, classes: F.pixel_agreement(earlier, classes, CLASSES),
    "pseudo_label": lambda logits, threshold: F.pseudo_label(logits, threshold=threshold.detach()),
    "pseudo_label, all": lambda logits: F.pseudo_label(logits),
    "quantile_over_processes": lambda scores, where: F.quantile_over_processes(scores[:, 0], 0.4, where=where),
    "refine_flaws": lambda scores, where: F.refine_flaws(scores[:, 0], where=where),
    "squared_difference": lambda logits, others, where: F.squared_difference(logits, others, where=where),
    "stability": lambda earlier, classes: F.stability(earlier, classes, CLASSES),
    "supervised_loss": lambda logits, masks: F.supervised_loss(logits, masks),
    "supervised_loss, another": lambda logits, masks: F.supervised_loss(logits, masks, loss=ENTROPY),
    "sure_share": lambda masks: F.sure_share(masks, CLASSES),
    "turn": lambda images: F.turn(images[..., :8], torch.arange(4)),
    "weighted_stability": lambda earlier, classes: F.weighted_stability(earlier, classes, CLASSES, power=0.5),
    "without_ignored": lambda logits, masks: F.without_ignored(ENTROPY)(logits, masks),
}

RANDOM = {  # these draw from torch's global generator
    "WeakAugment": lambda image, mask: stseg.WeakAugment(7, quarter_turns=True)(image, mask),
    "WeakAugment, bytes": lambda bytes_image, mask: stseg.WeakAugment(16)(bytes_image, mask),
    "WeakAugment, one size": lambda image, mask: stseg.WeakAugment((12, 9), scale=(1, 1), flip=0)(image, mask),
    "StrongAugment": lambda images, bytes_, rows: STRONG(images, bytes_, rows),
    "StrongAugment, all": lambda images, masks: STRONG(images, masks),
    "StrongAugment, one channel": lambda one_channel, masks: STRONG(one_channel, masks),
    "StrongAugment, nothing": lambda images, masks, rows: NOTHING(images, masks, rows),
    "StrongAugment, nothing anywhere": lambda images, masks: NOTHING(images, masks),
    "Cutout": lambda images, bytes_, rows: stseg.Cutout(p=0.5)(images, bytes_, rows),
    "Cutout, never": lambda images, bytes_: stseg.Cutout(p=0)(images, bytes_),
    "CutMix": lambda images, masks, where: stseg.CutMix()(images, masks, where),
    "BoxMix": lambda images, masks, where: BoxMix(boxes=3)(images, masks, where),
    "ClassMix": lambda images, classes, where: stseg.ClassMix(CLASSES)(images, classes, where),
    "CutMix, never": lambda images, masks: stseg.CutMix(p=0)(images, masks),
    "CropPair": lambda image: CropPair(8, base_size=12)(image),
    "CropPair, bytes": lambda bytes_image: CropPair(16)(bytes_image),
    "strong_view": lambda images, masks: strong_view(images, masks, STRONG, stseg.CutMix()),
    "strong_view, of nothing": lambda images, masks: strong_view(images, masks),
    "from_torchvision": lambda image, mask: from_torchvision(v2.RandomHorizontalFlip(p=1))(image, mask),
    "from_torchvision, nothing": lambda image, mask: from_torchvision(v2.Identity())(image, mask),
    "from_torchvision, in place": lambda image, mask: from_torchvision(v2.RandomErasing(p=1, inplace=True))(
        image, mask
    ),
    "from_albumentations": lambda bytes_image, mask: from_albumentations(MIRRORED)(bytes_image, mask),
    "from_albumentations, nothing": lambda image, mask: from_albumentations(albumentations.NoOp())(image, mask),
    "from_kornia": lambda images, bytes_, rows: from_kornia(K.RandomErasing(p=1))(images, bytes_, rows),
    "from_kornia, never": lambda images, masks: from_kornia(K.ColorJitter(0.5, p=0))(images, masks),
    "as_pair_transform": lambda image, mask: as_pair_transform(v2.RandomVerticalFlip(p=1))(image, mask),
    "as_batch_augmentation": lambda images, masks: as_batch_augmentation(K.RandomRotation(30.0))(images, masks, None),
    "channel_dropout": lambda images: channel_dropout(images, 0.5),
    "channel_dropout, never": lambda images: channel_dropout(images, 0.0),
    "channel_dropout, tokens": lambda tokens: channel_dropout(tokens, 0.5),
    "channel_dropout, tokens, never": lambda tokens: channel_dropout(tokens, 0.0),
    "channel_dropout, vectors": lambda vectors: channel_dropout(vectors, 0.5),
    "channel_dropout, vectors, never": lambda vectors: channel_dropout(vectors, 0.0),
    "feature_noise": lambda images: stseg.modules.feature_noise(images),
    "feature_noise, none": lambda images: stseg.modules.feature_noise(images, 0.0),
    "feature_drop": lambda images: stseg.modules.feature_drop(images),
    "guided_cutout": lambda images, where: stseg.modules.guided_cutout(images, F.connected_components(where)),
    "adversarial_perturbation": lambda images: stseg.modules.adversarial_perturbation(CONVOLUTION, images),
    "complementary_dropout": lambda images, tokens, vectors: complementary_dropout([images, tokens, vectors]),
    "complementary_dropout, never": lambda images: complementary_dropout([images], 0.0),
    "StrongParameters": lambda images, masks: STRONG.transform(images, masks, STRONG.draw(images)),
}

NETWORKS = {
    "Segmenter": lambda images: stseg.Segmenter(CONVOLUTION)(images),
    "Segmenter, bytes": lambda bytes_image: stseg.Segmenter(CONVOLUTION)(bytes_image[None]),
    "Segmenter, unnormalized": lambda images: stseg.Segmenter(CONVOLUTION, mean=None, std=None)(images),
    "Segmenter, padded": lambda images: stseg.Segmenter(CONVOLUTION, stride=16)(images),
    "Segmenter, one logit": lambda images: stseg.Segmenter(nn.Conv2d(3, 1, 1))(images),
    "MultiScaleFlip": lambda images: stseg.MultiScaleFlip(CONVOLUTION)(images),
    "Tiled": lambda images: stseg.Tiled(CONVOLUTION, size=4)(images),
    "Tiled, bytes": lambda bytes_image: stseg.Tiled(CONVOLUTION, size=4)(bytes_image[None]),
    "Tiled, one": lambda images: stseg.Tiled(CONVOLUTION)(images),
    "as_segmenter": lambda images: as_segmenter(CONVOLUTION)(images),
    "PseudoLabeler": lambda images: stseg.PseudoLabeler(CONVOLUTION, num_classes=CLASSES)(images),
    "StabilityRanker": lambda images: stseg.StabilityRanker([CONVOLUTION] * 3, num_classes=CLASSES)(images),
    "ConfidenceRanker": lambda images: stseg.ConfidenceRanker(CONVOLUTION, num_classes=CLASSES)(images),
    "ConvCritic": lambda logits: CRITIC(logits),
    "conv_critic": lambda logits: conv_critic(CLASSES)(logits),
    "frozen": lambda logits: frozen(CRITIC)(logits),
    "ImageCritic": lambda logits: ImageCritic(CLASSES).eval()(logits),
    "representation_head": lambda images: representation_head(3, 4).eval()(images),
    "logits_and_features": lambda images: logits_and_features(
        stseg.Segmenter(nn.Sequential(CONVOLUTION)), images, channels=CLASSES, features="0"
    ),
    "decoder_of": lambda images: decoder_of(nn.Sequential(CONVOLUTION), "0")(images),
    "Ring": lambda vectors, rows: Ring(9, 5).add(vectors, rows.long(), where=rows),
    "FlawDetector": lambda images, logits: DETECTOR(images, logits),
    "PixelShuffleDecoder": lambda images: DECODER(images),
    "RotationHead": lambda logits: ROTATION(logits),
    "MeanIoU": lambda classes, masks: stseg.MeanIoU(CLASSES).update(classes, masks),
    "MeanIoU of images": lambda classes, masks: stseg.MeanIoU(CLASSES, per_image=True).update(classes, masks),
    "BoundaryIoU": lambda classes, masks: stseg.BoundaryIoU(CLASSES).update(classes, masks),
    "draw_confusion_matrix": lambda matrix: str(stseg.draw_confusion_matrix(matrix)),
    "DeepLabV3Plus": lambda images: DeepLabV3Plus("resnet18", num_classes=2)(images),
    "PSPNet": lambda images: PSPNet("resnet18", num_classes=2)(images),
    "DeepLabV2": lambda images: DeepLabV2("resnet18", num_classes=2)(images),
}
DRAW_WEIGHTS = {
    *("Segmenter, one logit", "conv_critic", "ImageCritic", "representation_head"),
    *("DeepLabV3Plus", "PSPNet", "DeepLabV2"),
}


def check_call(function, kind):
    given = pool()
    values = {name: KINDS[kind](given[name]) for name in inspect.signature(function).parameters}
    with same_tensors(values):
        result = function(**values)
    mine = {storage(x) for x in values.values()}
    assert not [x for x in tensors_in(result) if storage(x) in mine], "the result shares memory with an argument"


@pytest.mark.filterwarnings("ignore:RandomErasing")
@pytest.mark.parametrize("kind", KINDS)
class TestTensors:
    @pytest.mark.parametrize("name", FUNCTIONAL)
    def test_stay_as_they_are_in_functions(self, name, kind):
        with same_random_states():
            check_call(FUNCTIONAL[name], kind)

    @pytest.mark.parametrize("name", RANDOM)
    def test_stay_as_they_are_in_augmentations(self, name, kind):
        with same_random_states(but=("torch",)):
            check_call(RANDOM[name], kind)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_stay_as_they_are_in_networks(self, name, kind):
        with same_random_states(but=("torch",) if name in DRAW_WEIGHTS else ()):
            check_call(NETWORKS[name], kind)


def test_a_generator_that_is_given_is_the_only_one_that_advances():
    given = pool()
    for function in (STRONG, stseg.Cutout()):
        with same_random_states():
            function(given["images"], given["masks"], generator=torch.Generator().manual_seed(0))
    with same_random_states():
        stseg.CutMix()(given["images"], generator=torch.Generator().manual_seed(0))


WRITES = nn.Hardtanh(0.2, 0.8, inplace=True)  # as of a network that normalizes its input in place


@pytest.mark.parametrize(
    "wrap",
    [lambda net: net, stseg.MultiScaleFlip, lambda net: stseg.Tiled(net, 4)],
    ids=["Segmenter", "MultiScaleFlip", "Tiled"],
)
def test_images_stay_as_they_are_in_a_network_that_writes_into_its_input(wrap):
    model = wrap(stseg.Segmenter(nn.Sequential(WRITES, CONVOLUTION), mean=None, std=None, stride=1))
    check_call(lambda images: model(images), "plain")


def test_logits_share_no_memory_with_the_images():
    check_call(lambda images: stseg.Segmenter(nn.Identity(), mean=None, std=None)(images), "plain")


# --- containers


def test_lists_and_dictionaries_stay_as_they_are():
    def settings():
        return {
            "jitter": [0.5, 0.5, 0.5, 0.25],
            "sizes": [8, 8],
            "scales": [0.5, 1.0],
            "thresholds": [0.5, 0.6],
            "ids": ["b", "a", "c"],
            "scores": [0.1, 0.9, 0.5],
            "indices": [2, 0, 1],
            "features": {"out": torch.zeros(2, 3, 4, 4), "levels": [torch.zeros(1, 2), ("x", torch.ones(1))]},
            "config": {"batch_size": 2, "steps": 3},
            "networks": [network(0), network(1)],
            "mean": [0.1, 0.2, 0.3],
        }

    given = settings()
    stseg.StrongAugment(jitter=given["jitter"])
    stseg.WeakAugment(given["sizes"])
    stseg.MultiScaleFlip(network(), scales=given["scales"])
    stseg.Segmenter(network(), mean=given["mean"], std=given["mean"])
    Labeling(threshold=given["thresholds"])
    stseg.PseudoLabeler(network(), threshold=given["thresholds"], **QUIET)
    stseg.TrainConfig.pascal(**given["config"])
    networks = list(given["networks"])
    stseg.StabilityRanker(given["networks"], **QUIET)
    assert all(one is other for one, other in zip(networks, given["networks"], strict=True))
    with same_random_states():
        split_ids(given["ids"], 1)
        ranking = stseg.Ranking.from_scores(given["scores"], given["ids"], indices=given["indices"])
    reliable, rest = ranking.split()
    reliable.append(7)
    rest.clear()
    assert ranking.split() == ([0], [1, 2])
    leaves = tensors_in(given["features"])
    with same_tensors(leaves):
        doubled = map_features(lambda x: x * 2, given["features"])
        doubled["levels"].clear()
        doubled["more"] = 1
    assert all(one is other for one, other in zip(leaves, tensors_in(given["features"]), strict=True))
    was = settings()
    assert list(given["features"]) == list(was["features"])
    assert {k: v for k, v in given.items() if k not in ("features", "networks")} == {
        k: v for k, v in was.items() if k not in ("features", "networks")
    }


def test_arrays_and_networks_stay_as_they_are_in_inference_by_tiles(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    net, image = partly_frozen(), np.random.default_rng(0).random((3, 40, 50), dtype=np.float32)
    before = image.copy()
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="GTiff",
        width=50,
        height=40,
        count=3,
        dtype="float32",
        crs="EPSG:32633",
        transform=rasterio.Affine(1, 0, 0, 0, -1, 0),
    ) as file:
        file.write(image)
    content = (tmp_path / "a.tif").read_bytes()
    with same_networks(net), same_random_states():
        stseg.predict_array(net, image, tile=16, progress=False)
        stseg.predict_raster(net, tmp_path / "a.tif", tmp_path / "b.tif", tile=16, progress=False)
    assert np.array_equal(image, before)
    assert (tmp_path / "a.tif").read_bytes() == content


# --- networks


class TestNetworks:
    def test_stay_as_they_are_when_wrapped_and_called(self):
        net, images = partly_frozen().eval(), torch.rand(2, 3, 16, 16)
        with same_networks(net), same_random_states(), torch.no_grad():
            stseg.Segmenter(net)(images)
            as_segmenter(net)(images)
            stseg.MultiScaleFlip(net)(images)
            backbone_of(net, "0")

    @pytest.mark.parametrize("training", [True, False])
    def test_keep_modes_and_statistics_while_their_stride_is_found(self, training):
        net = network().train(training)
        net[3].eval()
        modes = [module.training for module in net.modules()]
        with torch.no_grad():
            stseg.Segmenter(net)(torch.rand(2, 3, 16, 16))
        assert [module.training for module in net.modules()] == modes
        assert net[1].num_batches_tracked == int(training)  # the call itself

    @pytest.mark.parametrize("use", ["label", "thresholds", "call", "rank", "rank by confidence", "evaluate"])
    def test_stay_as_they_are(self, use):
        nets, data = [partly_frozen(seed) for seed in range(3)], pairs(5)
        images = [image for image, _ in data]
        with same_networks(*nets), same_tensors(data), same_random_states():
            if use == "label":
                labeled = stseg.PseudoLabeler(nets[0], **QUIET).label(images, confidence=True)
                for index in range(len(labeled)):
                    labeled[index][1].zero_()
                    labeled.confidence(index).zero_()
            elif use == "thresholds":
                stseg.PseudoLabeler(nets[0], **QUIET).class_thresholds(images)
            elif use == "call":
                stseg.PseudoLabeler(stseg.MultiScaleFlip(nets[0]), **QUIET)(torch.stack(images))
            elif use == "rank":
                stseg.StabilityRanker(nets, **QUIET).rank(images)
            elif use == "rank by confidence":
                stseg.ConfidenceRanker(nets[0], **QUIET).rank(data)
            else:
                stseg.evaluate(nets[0], data, **QUIET)
        assert len(data) == len(images) == 5

    def test_stay_as_they_are_when_workers_read_the_images(self):
        net, data = partly_frozen(), pairs(3)
        with same_networks(net), same_tensors(data), same_random_states():
            stseg.evaluate(net, data, num_workers=1, **QUIET)
            stseg.PseudoLabeler(net, num_workers=1, **QUIET).label([image for image, _ in data])

    def test_stay_as_they_are_when_they_fail(self):
        net, data = partly_frozen(classes=3), pairs(3)
        with same_networks(net), same_random_states():
            with pytest.raises(stseg.NetworkError):
                stseg.PseudoLabeler(net, **QUIET).label([image for image, _ in data])
            with pytest.raises(stseg.NetworkError):
                stseg.evaluate(net, data, **QUIET)

    def test_stay_as_they_are_in_an_average(self):
        net = partly_frozen()
        with same_networks(net), same_random_states():
            average = EMA(net, buffers="average")
            for step in range(3):
                average.update(net, step)
            average.model[0].weight.data.zero_()

    def test_stay_as_they_are_when_their_features_are_read_or_changed(self):
        net, images = partly_frozen().eval(), torch.rand(2, 3, 16, 16)
        model = stseg.Segmenter(net, stride=1)
        with same_networks(model), same_tensors(images), torch.no_grad():
            with captured(net[0]) as features:
                model(images)
            assert len(features) == 1
            with rewritten(net[0], torch.zeros_like):
                model(images)
            with perturbed_features(model, partial(channel_dropout, p=0.5), backbone="0"):
                model(images)
            with stseg.modules.deepest_features(model, features="0"):
                model(images)
            with changed_features(model, complementary_dropout, backbone="0"):
                model(images)

    def test_stay_as_they_are_when_frozen(self):
        critic = ConvCritic(2)
        critic.layers[0].requires_grad_(False)
        maps = torch.rand(1, 2, 32, 32, requires_grad=True)
        with same_networks(critic), same_random_states():
            frozen(critic)(maps).sum().backward()

    def test_are_saved_as_they_are(self, tmp_path):
        net, other = partly_frozen(0), partly_frozen(1)
        other_modes = [module.training for module in other.modules()]
        with same_networks(net), same_random_states():
            stseg.save_weights(net, tmp_path / "weights.safetensors")
            stseg.load_weights(other, tmp_path / "weights.safetensors")
            stseg.export_onnx(net, tmp_path / "network.onnx")
        assert [module.training for module in other.modules()] == other_modes
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in net.parameters()]


# --- methods

METHODS = {
    "Supervised": lambda net: Supervised(net, strong=STRONG, pseudo_weight=0.5),
    "Supervised, plain": Supervised,
    "FixMatch": lambda net: FixMatch(net, threshold=0.4),
    "FixMatch, no augmentation": lambda net: FixMatch(net, threshold=0.4, strong=None, mix=None),
    "UniMatch": lambda net: UniMatch(net, threshold=0.4, backbone="0"),
    "CCT": lambda net: stseg.methods.CCT(
        net, num_classes=2, channels=4, features="0", decoders=dict.fromkeys(stseg.methods.cct.DECODERS, 1)
    ),
    "GCT": lambda net: stseg.methods.GCT(
        net, network(1), num_classes=2, detector=stseg.modules.FlawDetector(5, width=4)
    ),
    "S4L": lambda net: stseg.methods.S4L(net, num_classes=2),
    "UniMatchV2": lambda net: UniMatchV2(net, threshold=0.4, backbone="0"),
    "MeanTeacher": MeanTeacher,
    "CutMixSeg": lambda net: CutMixSeg(net, threshold=0.4),
    "ClassMix": lambda net: ClassMix(net, threshold=0.4),
    "CPS": lambda net: CPS(net, network(1)),
    "CPS, CutMix": lambda net: CPS(net, network(1), mix=BoxMix()),
    "AdvSSL": lambda net: AdvSSL(net, num_classes=2),
    "S4GAN": lambda net: S4GAN(net, num_classes=2, threshold=0),
    "ECS": lambda net: ECS(net, nn.Conv2d(5, 3, 1)),
    "U2PL": lambda net: U2PL(net, num_classes=2, channels=4, features="2", width=4, memory=9),
    "DCC": lambda net: DCC(net, channels=4, features="2", width=4, pairs=CropPair(16), memory=9),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_its_batch_and_the_settings_of_its_network_as_they_are(name, kind):
    generator = torch.Generator().manual_seed(0)
    kept = KINDS[kind]
    masks = torch.randint(2, (4, 32, 32), generator=generator)
    masks[:, :3] = 255
    batch = stseg.Batch(
        images=kept(torch.rand(4, 3, 32, 32, generator=generator)),
        masks=kept(masks),
        is_pseudo=kept(torch.tensor([False, True, False, True])),
        unlabeled=kept(torch.rand(4, 3, 32, 32, generator=generator)),
        valid=kept(torch.ones(4, 32, 32, dtype=torch.bool)),
        step=1,
        steps=2,
    )
    net = partly_frozen()
    with same_tensors(batch), same_random_states(but=("torch",)):
        with same_networks(net):
            method = METHODS[name](net)
        if name == "DCC":
            crops = [method.view(image, None)[0] for image in batch.unlabeled]
            batch = batch._replace(unlabeled={key: torch.stack([crop[key] for crop in crops]) for key in crops[0]})
        modes = [module.training for module in net.modules()]
        flags = [p.requires_grad for p in net.parameters()]
        losses = method(batch)
        with torch.no_grad():
            method.after_step(batch)
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    mine = {storage(x) for x in tensors_in(batch)}
    assert not [x for x in tensors_in(losses) if storage(x) in mine]


# --- data sets


def save_files(folder):
    for index, (image, mask) in enumerate(SyntheticScenes(2, size=16)):
        for kind, pixels in (("images", image.permute(1, 2, 0)), ("masks", mask)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / kind / f"{index}.png")


def data_sets(folder):
    save_files(folder)
    listed = [FilePair(f"images/{index}.png", f"masks/{index}.png") for index in range(2)]
    images = SegmentationFolder(folder / "images", folder / "masks")
    return {
        "SyntheticScenes": SyntheticScenes(2, size=16),
        "SegmentationFolder": images,
        "ListedFiles": ListedFiles(folder, listed),
        "MixedDataset": MixedDataset(images),
        "ClassMap": [(ClassMap({0: 0, 1: 1, 2: 2})(mask), mask) for _, mask in images],
        "PseudoLabeled": stseg.PseudoLabeler(network(), **QUIET).label(SyntheticScenes(2, size=16)),
    }


@pytest.mark.parametrize(
    "name", ["SyntheticScenes", "SegmentationFolder", "ListedFiles", "MixedDataset", "PseudoLabeled"]
)
def test_items_are_the_callers_to_write_into(name, tmp_path):
    dataset = data_sets(tmp_path)[name]
    with same_random_states():
        before = [x.clone() for x in tensors_in(dataset[1])]
        for x in tensors_in(dataset[1]):
            x.fill_(1)
        assert all(torch.equal(*pair) for pair in zip(before, tensors_in(dataset[1]), strict=True))


@pytest.mark.parametrize("weak", [None, stseg.WeakAugment(8)])
def test_a_mixture_and_pseudo_labels_leave_the_data_sets_as_they_are(weak):
    labeled, images = pairs(2), [image for image, _ in pairs(4, seed=1)]
    with same_tensors(labeled, images):
        pseudo = stseg.PseudoLabeler(network(), **QUIET).label(images)
        mixed = MixedDataset(labeled, pseudo, transform=weak)
        assert len([mixed[index] for index in range(len(mixed))]) == 8
    assert (len(labeled), len(images)) == (2, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weak", [None, stseg.WeakAugment(16)], ids=["as they are", "cropped"])
def test_items_stay_as_they_are_wherever_they_are_read(weak, kind):
    data = [(KINDS[kind](image), KINDS[kind](mask)) for image, mask in pairs(4)]
    net = network()
    with same_tensors(data), same_random_states():
        stseg.evaluate(net, data, **QUIET)
        stseg.PseudoLabeler(net, **QUIET).label(data)
        stseg.PseudoLabeler(net, **QUIET).class_thresholds(data)
        stseg.StabilityRanker([net, network(1)], **QUIET).rank(data)
        stseg.fit(FixMatch(net), data, config(weak=weak), unlabeled=data, progress=False)


@pytest.mark.parametrize("folder", [False, True])
def test_a_mask_store_keeps_and_gives_copies(folder, tmp_path):
    store = stseg.MaskStore(tmp_path / "masks" if folder else None)
    mask, confidence = torch.ones(4, 6, dtype=torch.uint8), torch.full((4, 6), 0.5)
    with same_tensors(mask, confidence), same_random_states():
        store.put("a", mask, confidence)
        store.get("a").zero_()
        store.confidence("a").zero_()
    mask.zero_()
    confidence.zero_()
    assert store.get("a").all()
    assert store.confidence("a").all()


# --- trainings


def config(**changes):
    return stseg.TrainConfig(**{"steps": 3, "batch_size": 2, "weak": stseg.WeakAugment(16), **changes})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weak", [None, stseg.WeakAugment(32)], ids=["as they are", "cropped"])
def test_fit_changes_nothing_but_its_network(method, weak):
    """Which it trains in place and returns in evaluation mode; frozen parameters stay frozen."""
    data, images, val = pairs(4, size=32), [image for image, _ in pairs(4, size=32, seed=1)], pairs(2, size=32, seed=2)
    net, snapshots, settings = partly_frozen(), [3, 1], config(weak=weak)
    was = copy.deepcopy(settings)
    frozen_weights, flags = net[1].weight.clone(), [p.requires_grad for p in net.parameters()]
    built = METHODS[method](net)
    with same_tensors(data, images, val), same_random_states():
        unlabeled = images if built.uses_unlabeled else None
        result = stseg.fit(built, data, settings, unlabeled=unlabeled, val=val, snapshots=snapshots, progress=False)
    assert (len(data), len(images), len(val), snapshots) == (4, 4, 2, [3, 1])
    assert settings == was
    assert [p.requires_grad for p in net.parameters()] == flags
    assert torch.equal(net[1].weight, frozen_weights)
    assert not any(module.training for module in result.model.modules())


class Broken(Supervised):
    def after_step(self, batch):
        torch.rand(3)
        raise RuntimeError("broken")


def test_fit_leaves_everything_as_it_is_when_its_trial_fails_and_the_generators_when_it_is_stopped():
    data, method, stopped = pairs(4), Broken(network()), Stopped(network(), after=1)
    with same_tensors(data), same_networks(method), same_random_states():
        with pytest.raises(stseg.MethodError, match="broken"):
            stseg.fit(method, data, config(), progress=False)
        with pytest.raises(KeyboardInterrupt):
            stseg.fit(stopped, data, config(), progress=False)


@pytest.mark.parametrize("recipe", [ST, STPlusPlus, "supervised", "FixMatch"])
def test_self_training_changes_nothing(recipe, tmp_path):
    labeled, images, val = pairs(3), [image for image, _ in pairs(4, seed=1)], pairs(2, seed=2)
    made = []

    def make_model():
        made.append(network(7))
        return made[-1]

    if isinstance(recipe, type):
        method = recipe(labeling=Labeling(tta=None))
    else:
        method = recipe if recipe == "supervised" else lambda make: FixMatch(make())
    teacher = None
    if isinstance(recipe, type):
        fitted = stseg.fit(partly_frozen(), labeled, config(), snapshots=[1, 2, 3], progress=False)
        fitted.model.network.train()
        fitted.model.network[1].eval()
        teacher = fitted
    networks = [] if teacher is None else [teacher.model, *teacher.snapshots]
    logged = []
    with same_tensors(labeled, images, val), same_networks(*networks), same_random_states():
        trainer = stseg.SelfTrainer(
            make_model,
            num_classes=2,
            config=config(),
            method=method,
            workdir=tmp_path / "run",
            log=logged.append,
            progress=False,
        )
        unlabeled = None if recipe == "supervised" else images
        result = trainer.fit(labeled, unlabeled, val, **({} if teacher is None else {"teacher": teacher}))
        with same_networks(result.model):
            stseg.write_report(result, tmp_path / "report")
    assert (len(labeled), len(images), len(val)) == (3, 4, 2)
    history = [dict(row) for stage in result.stages.values() for row in stage.history]
    for row in logged:
        row.clear()
    assert [dict(row) for stage in result.stages.values() for row in stage.history] == history


def test_an_image_stays_as_it_is_in_predict_mask():
    given = pool()
    model = partly_frozen()
    array = given["bytes_image"].permute(1, 2, 0).numpy().copy()
    before = array.copy()
    with same_networks(model), same_random_states(), same_tensors(given):
        for image in (given["image"], given["bytes_image"]):
            stseg.predict_mask(model, image)
        stseg.predict_mask(model, array)
    assert (array == before).all()


def test_settings_of_a_method_and_of_a_network_stay_as_they_are():
    options = {"decoder_pyramid_channels": 16}
    create_network("FPN", "tu-test_resnet", num_classes=2, weights=None, options=options)
    assert options == {"decoder_pyramid_channels": 16}
    settings = {"weight": 2.0}
    create_method("cps", num_classes=2, **settings).method(network)
    assert settings == {"weight": 2.0}


def test_parts_and_sums_of_data_sets_leave_them_as_they_are():
    scenes = SyntheticScenes(3, size=16)
    ids = list(scenes.ids)
    assert isinstance(scenes, NamedDataset)
    assert (
        len(scenes.only(ids[:1])),
        len(scenes.without(ids[:1])),
        len(scenes.only(ids[:1]) + scenes.only(ids[1:])),
    ) == (1, 2, 3)
    assert scenes.ids == ids


# --- completeness

NO_ARGUMENT_THAT_COULD_CHANGE = {
    *("PseudoLabels", "linear_rampup", "polynomial_decay", "sigmoid_rampup"),  # of stseg.functional: numbers
    *("IMAGENET_MEAN", "IMAGENET_STD", "__version__", "Skipped", "Losses", "Method", "FitResult", "SelfTrainingResult"),
    *("DataWarning", "NetworkWarning"),
    *("StsegError", "DataError", "UnreadableImageError", "NetworkError", "MethodError", "TrainingDivergedError"),
    "MetricError",
    *("WorkdirMismatchError", "WorkdirInUseError", "WorkdirMissingError", "DamagedFileError"),
    *("augment", "data", "functional", "loggers", "methods", "models", "modules"),
    *("OneStage", "Recipe", "Baseline"),
    *("read_ids", "read_pairs", "split_by_masks", "compare_runs"),  # files
    *("Folders", "Training", "train_folders", "check_folders", "FolderCheck", "Estimate"),  # frozen, and files
    *("list_methods", "Predictions"),
}


@pytest.mark.parametrize(
    "module", [stseg, stseg.augment, stseg.data, stseg.functional, stseg.methods, stseg.models, stseg.modules]
)
def test_every_public_name_is_here(module):
    text = inspect.getsource(inspect.getmodule(test_every_public_name_is_here)).split("# --- completeness")[0]
    missing = [name for name in module.__all__ if name not in text and name not in NO_ARGUMENT_THAT_COULD_CHANGE]
    assert missing == []
