"""What a user gets wrong: each has an error that names the item, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stseg
from stseg import DataError, MethodError, NetworkError, SelfTrainer, TrainConfig, UnreadableImageError, WeakAugment
from stseg.data import SegmentationFolder, split_ids
from stseg.methods import STPlusPlus

CONFIG = TrainConfig(steps=3, batch_size=2, weak=WeakAugment(16))


class Counted(nn.Conv2d):
    """A network that remembers how often it was trained."""

    trained = 0

    def forward(self, x):
        Counted.trained += self.training
        return super().forward(x)


@pytest.fixture(autouse=True)
def untrained():
    Counted.trained = 0
    yield
    assert Counted.trained == 0, "time was spent before the error"


def pairs(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 20, 20, generator=generator)
    return [(image, (image[0] > 0.5).byte()) for image in images]


IMAGES = [image for image, _ in pairs(6)]


class WithIds(list):
    def __init__(self, items, ids) -> None:
        super().__init__(items)
        self.ids = ids


def trainer(**options) -> SelfTrainer:
    options = {"num_classes": 2, "config": CONFIG, "progress": False, **options}
    return SelfTrainer(options.pop("make_model", lambda: Counted(3, 2, 1)), **options)


def spoilt(index: int, mask: object, image: torch.Tensor | None = None) -> list:
    items: list = pairs()
    items[index] = (items[index][0] if image is None else image, mask)
    return items


class TestMasks:
    @pytest.mark.parametrize("value", [2, 34, 254])
    def test_with_a_value_that_is_no_class(self, value):
        mask = pairs()[2][1]
        mask[5, 7] = value
        data = WithIds(spoilt(2, mask), ["a", "b", "img_0042"])
        message = rf"mask of 'img_0042' holds the value {value}; expected 0\.\.1 or 255"
        with pytest.raises(DataError, match=message):
            trainer().fit(data, IMAGES)
        with pytest.raises(DataError, match=message):
            trainer().fit(pairs(), IMAGES, data)
        with pytest.raises(DataError, match=message):
            stseg.fit(Counted(3, 2, 1), data, CONFIG, progress=False)
        with pytest.raises(DataError, match=message):
            stseg.evaluate(Counted(3, 2, 1), data, num_classes=2, progress=False)

    def test_with_a_negative_value(self):
        mask = pairs()[0][1].int()
        mask[0, 0] = -1
        with pytest.raises(DataError, match="mask of '0' holds the value -1"):
            trainer().fit(spoilt(0, mask), IMAGES)

    def test_of_another_size_than_the_image(self):
        message = "image and mask of '1' differ in size: image 20 x 20, mask 10 x 20"
        with pytest.raises(DataError, match=message):
            trainer().fit(spoilt(1, torch.zeros(10, 20, dtype=torch.uint8)), IMAGES)

    @pytest.mark.parametrize("mask", [torch.zeros(20, 20), np.zeros((20, 20))], ids=["tensor", "array"])
    def test_of_floats(self, mask):
        with pytest.raises(TypeError, match=r"mask of '1' is torch\.float\d\d; expected integer class indices"):
            trainer().fit(spoilt(1, mask), IMAGES)

    def test_that_are_missing(self):
        with pytest.raises(DataError, match=r"item '0' has no mask; expected \(image, mask\)"):
            trainer().fit(IMAGES, IMAGES)

    def test_that_hold_nothing_but_the_ignore_index(self):
        nothing = [(image, torch.full((20, 20), 255, dtype=torch.uint8)) for image in IMAGES[:2]]
        with pytest.raises(DataError, match="masks of the labeled data set hold nothing but the ignore index 255"):
            trainer().fit(nothing, IMAGES)
        with pytest.raises(DataError, match="validation data set hold nothing but"):
            trainer().fit(pairs(), IMAGES, nothing)


class TestEmptyDataSets:
    def test_of_labeled_images(self):
        with pytest.raises(DataError, match="labeled data set is empty"):
            trainer().fit([], IMAGES)

    def test_of_unlabeled_images(self):
        with pytest.raises(DataError, match="unlabeled data set is empty"):
            trainer().fit(pairs(), [])

    def test_of_validation_images(self):
        with pytest.raises(DataError, match="validation data set is empty"):
            trainer().fit(pairs(), IMAGES, [])

    def test_for_each_primitive(self):
        network = Counted(3, 2, 1)
        with pytest.raises(DataError, match="empty"):
            stseg.fit(network, [], CONFIG)
        with pytest.raises(DataError, match="empty"):
            stseg.PseudoLabeler(network, num_classes=2).label([])
        with pytest.raises(DataError, match="empty"):
            stseg.StabilityRanker([network, network], num_classes=2).rank([])
        with pytest.raises(DataError, match="empty"):
            stseg.data.MixedDataset([])
        with pytest.raises(DataError, match="there are no ids to split"):
            split_ids([])

    def test_that_have_no_length(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from pairs()

        with pytest.raises(TypeError, match="expected a map-style data set with a length, got Stream"):
            trainer().fit(Stream(), IMAGES)


class TestIds:
    @pytest.mark.parametrize(
        ("names", "who"),
        [
            ((["a", "b", "c"], ["d", "b"], ["e", "f", "g"]), "'b' is in both the labeled and the unlabeled"),
            ((["a", "b", "c"], ["d", "e"], ["f", "c", "g"]), "'c' is in both the labeled and the validation"),
            ((["a", "b", "c"], ["d", "e"], ["f", "g", "e"]), "'e' is in both the unlabeled and the validation"),
        ],
    )
    def test_in_two_data_sets(self, names, who):
        data = WithIds(pairs(), names[0]), WithIds(IMAGES[:2], names[1]), WithIds(pairs(), names[2])
        with pytest.raises(DataError, match=f"the id {who} data set"):
            trainer().fit(*data)

    def test_twice_in_one(self):
        with pytest.raises(DataError, match="the id 'x' occurs more than once"):
            trainer().fit(pairs(), WithIds(IMAGES[:2], ["x", "x"]))

    @pytest.mark.parametrize("id", ["../a", "a/../../b", "/etc/passwd", "a\\b", "C:/a", "", "a/./b", "a\nb", "a//b"])
    def test_that_would_leave_the_store(self, tmp_path, id):
        data = WithIds(IMAGES[:2], ["fine", id])
        with pytest.raises(DataError, match="cannot name a file in a store"):
            trainer(workdir=tmp_path / "run").fit(pairs(), data)
        with pytest.raises(DataError, match="cannot name a file in a store"):
            stseg.PseudoLabeler(Counted(3, 2, 1), num_classes=2).label(data, tmp_path / "masks")
        assert not list(tmp_path.rglob("*.png"))

    def test_of_which_there_are_too_few(self):
        with pytest.raises(DataError, match="the data set has 6 items but 2 ids"):
            trainer().fit(pairs(), WithIds(IMAGES, ["a", "b"]))


class TestNetworks:
    def test_of_other_classes(self):
        with pytest.raises(NetworkError, match="the network gives 3 classes; num_classes is 2"):
            trainer(make_model=lambda: Counted(3, 3, 1)).fit(pairs(), IMAGES)
        message = r"gives 2 classes; num_classes is 3 \(one logit counts as two classes\)"
        with pytest.raises(NetworkError, match=message):
            trainer(make_model=lambda: Counted(3, 1, 1), num_classes=3).fit(pairs(), IMAGES)
        with pytest.raises(NetworkError, match="the network gives 3 classes; num_classes is 2"):
            stseg.PseudoLabeler(Counted(3, 3, 1), num_classes=2, progress=False).label(IMAGES)
        with pytest.raises(NetworkError, match="the network gives 3 classes; num_classes is 2"):
            stseg.StabilityRanker([Counted(3, 3, 1)] * 2, num_classes=2, progress=False).rank(IMAGES)

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (lambda x: x.softmax(1), r"cannot leave \[0, 1\] and sum to 1, as probabilities do; expected logits"),
            (lambda x: x.argmax(1), r"returned torch\.int64 of shape .*; expected float logits"),
            (lambda x: x[:, :0], r"returned torch\.float32 of shape .*0, .*; expected float logits"),
            (lambda x: x.mean((2, 3)), r"returned torch\.float32 of shape \(1, 2\)"),
            (lambda x: x * float("nan"), "NaN or infinite logits"),
            (lambda x: {"a": x, "b": x}, r"a mapping with the keys \['a', 'b'\]"),
            (lambda x: None, "returned NoneType"),
        ],
        ids=["probabilities", "classes", "no channel", "no map", "nan", "unknown mapping", "nothing"],
    )
    def test_that_return_something_else_than_logits(self, output, message):
        class Odd(Counted):
            def forward(self, x):
                return output(super().forward(x))

        with pytest.raises(NetworkError, match=message):
            trainer(make_model=lambda: Odd(3, 2, 1)).fit(pairs(), IMAGES)

    def test_of_other_channels_than_the_images(self):
        with pytest.raises(NetworkError, match=r"cannot take an image of shape \(3, 20, 20\)"):
            trainer(make_model=lambda: Counted(4, 2, 1)).fit(pairs(), IMAGES)

    @pytest.mark.parametrize("count", [0, 1])
    def test_as_fewer_than_two_checkpoints(self, count):
        with pytest.raises(ValueError, match=f"got {count} checkpoints; expected two or more"):
            stseg.StabilityRanker([Counted(3, 2, 1)] * count, num_classes=2)

    @pytest.mark.parametrize("classes", [-1, 0, 1])
    def test_of_no_classes(self, classes):
        with pytest.raises(ValueError, match=f"num_classes is {classes}; expected 2 or more"):
            trainer(num_classes=classes)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pairs and four more images."""
    random = np.random.default_rng(0)
    for index in range(7):
        pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        save(tmp_path / ("images" if index < 3 else "more") / f"{index}.png", pixels)
        if index < 3:
            save(tmp_path / "masks" / f"{index}.png", (pixels[..., 0] > 127).astype(np.uint8))
    return tmp_path


class TestFiles:
    def test_of_which_one_has_no_partner(self, folder):
        (folder / "masks" / "1.png").unlink()
        with pytest.raises(DataError, match="the image '1' has no mask"):
            SegmentationFolder(folder / "images", folder / "masks")

    def test_of_which_two_have_one_name(self, folder):
        save(folder / "images" / "1.bmp", np.zeros((20, 20), np.uint8))
        with pytest.raises(DataError, match=r"1\.\w+ and .*1\.\w+ have the same id '1'"):
            SegmentationFolder(folder / "images", folder / "masks")

    @pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
    def test_that_cannot_be_read_are_named(self, folder, content):
        path = folder / "more" / "5.png"
        path.write_bytes(path.read_bytes()[:300] if content is None else content)
        labeled = SegmentationFolder(folder / "images", folder / "masks")
        with pytest.raises(UnreadableImageError, match=r"more/5\.png cannot be read"):
            trainer().fit(labeled, SegmentationFolder(folder / "more"))

    def test_that_cannot_be_read_are_left_out_and_listed_where_the_caller_chose_that(self, folder):
        path = folder / "more" / "5.png"
        path.write_bytes(path.read_bytes()[:300])
        labeled = SegmentationFolder(folder / "images", folder / "masks")
        runner = trainer(make_model=lambda: nn.Conv2d(3, 2, 1), skip_unreadable=True, workdir=folder / "run")
        result = runner.fit(labeled, SegmentationFolder(folder / "more"))
        assert [(skipped.index, skipped.id) for skipped in result.skipped] == [(2, "5")]
        assert sorted(result.ranking.ids) == ["3", "4", "6"]
        assert "5.png" in (folder / "run" / "report.html").read_text()

    def test_that_are_labeled_are_never_left_out(self, folder):
        path = folder / "images" / "2.png"
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(UnreadableImageError, match=r"images/2\.png cannot be read"):
            trainer(skip_unreadable=True).fit(SegmentationFolder(folder / "images", folder / "masks"), IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "st+"}, r"method is 'st\+'; expected 'supervised', 'st', 'st\+\+', 'fixmatch'"),
        ({"keep": "last"}, "keep is 'last'; expected 'final' or 'best'"),
        (
            {"config": TrainConfig(steps=3, weak=WeakAugment(16, ignore_index=1), ignore_index=1)},
            "ignore_index 1 is one of the 2 classes",
        ),
        ({"config": TrainConfig(steps=2)}, "keeps three checkpoints of the teacher; expected 3 epochs"),
    ],
)
def test_settings_of_the_trainer(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


@pytest.mark.parametrize("side", [32, 20])
def test_a_network_of_one_input_size_is_found_out_before_it_is_trained(side):
    """Of 20 pixels are the images themselves, but not what the ten views of the labeling show."""

    class Fixed(Counted):
        def forward(self, x):
            if x.shape[-1] != side:
                raise AssertionError(f"expected {side} pixels")
            return super().forward(x)

    message = rf"the network cannot take an image of shape \(3, .*\): expected {side} pixels .*dynamic_img_size"
    with pytest.raises(NetworkError, match=message):
        trainer(make_model=lambda: Fixed(3, 2, 1)).fit(pairs(), IMAGES)


class TestChannels:
    GREY = torch.rand(1, 20, 20)

    def test_of_a_labeled_image(self):
        with pytest.raises(DataError, match="image '1' has 1 channels; expected 3, as the first image has"):
            trainer().fit(spoilt(1, pairs()[1][1], self.GREY), IMAGES)

    def test_of_an_unlabeled_image(self):
        with pytest.raises(DataError, match="image '6' has 1 channels; expected 3"):
            trainer().fit(pairs(), [*IMAGES, self.GREY])

    def test_of_a_validation_image(self):
        with pytest.raises(DataError, match="image '0' has 1 channels; expected 3"):
            trainer().fit(pairs(), IMAGES, [(self.GREY, pairs()[0][1])])


class TestFit:
    def test_looks_at_the_validation_set_first(self):
        with pytest.raises(DataError, match="mask of '0' holds the value 9"):
            stseg.fit(Counted(3, 2, 1), pairs(), CONFIG, val=[(IMAGES[0], torch.full((20, 20), 9))], progress=False)
        with pytest.raises(DataError, match="validation data set is empty"):
            stseg.fit(Counted(3, 2, 1), pairs(), CONFIG, val=[], progress=False)

    def test_refuses_ids_that_are_in_both(self):
        data = WithIds(pairs(), ["a", "b", "c"])
        with pytest.raises(DataError, match="the id 'a' is in both the labeled and the validation"):
            stseg.fit(Counted(3, 2, 1), data, CONFIG, val=WithIds(pairs(1), ["a"]), progress=False)


def test_a_cutout_that_writes_another_value_than_the_ignore_index():
    config = TrainConfig(steps=3, batch_size=2, weak=WeakAugment(16, ignore_index=254), ignore_index=254)
    with pytest.raises(ValueError, match=r"cutout of strong writes 255 .* ignore_index is 254; expected strong="):
        trainer(config=config)
    strong = stseg.StrongAugment(cutout=stseg.Cutout(ignore_index=254))
    own = trainer(config=config, method=STPlusPlus(strong=strong), make_model=lambda: nn.Conv2d(3, 2, 1))
    assert own.fit(pairs(), IMAGES).stages["student-2"].history


def test_a_work_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"the work directory .* is a file; expected a folder"):
        trainer(workdir=tmp_path / "run").fit(pairs(), IMAGES)


def test_ids_of_a_wrapper_count_even_if_what_it_wraps_has_none():
    class Wrapper(WithIds):
        def __init__(self, items, ids) -> None:
            super().__init__(items, ids)
            self.dataset = items

    with pytest.raises(DataError, match="the id 'b' is in both the labeled and the unlabeled"):
        trainer().fit(Wrapper(pairs(), ["a", "b", "c"]), Wrapper(IMAGES[:2], ["b", "d"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 2.0}, TypeError, r"num_classes is 2\.0"),
        ({"num_classes": "2"}, TypeError, "num_classes is '2'"),
    ],
)
def test_an_argument_that_would_only_be_used_later(options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)


def test_a_strong_augmentation_that_cannot_be_called():
    with pytest.raises(TypeError, match="strong is 'none'"):
        trainer(method=STPlusPlus(strong="none"))


class Unread(list):
    """Items that may not be read."""

    def __getitem__(self, index):
        raise AssertionError("read before the cheap checks")


def test_what_can_be_told_without_reading_comes_first():
    with pytest.raises(DataError, match="unlabeled data set is empty"):
        trainer().fit(Unread(pairs()), [])
    with pytest.raises(DataError, match="leave none reliable"):
        trainer(method=STPlusPlus(reliable_fraction=0.1)).fit(Unread(pairs()), IMAGES)
    with pytest.raises(DataError, match=r"'\.\./a' cannot name a file"):
        trainer().fit(Unread(pairs()), WithIds(IMAGES, ["../a", "b", "c", "d", "e", "f"]))
    with pytest.raises(TypeError, match="teacher is str; expected a FitResult"):
        trainer().fit(Unread(pairs()), IMAGES, teacher="runs/first")
    with pytest.raises(ValueError, match=r"the teacher has 0, .*ranker=stseg\.ConfidenceRanker"):
        trainer().fit(Unread(pairs()), IMAGES, teacher=nn.Conv2d(3, 2, 1))


def test_a_backbone_that_is_not_there():
    config = TrainConfig(steps=3, batch_size=2, weak=WeakAugment(16), backbone="nope")
    with pytest.raises(
        MethodError, match=r"ValueError: backbone is 'nope'; the network \(Counted\) has no such submod"
    ):
        trainer(config=config).fit(pairs(), IMAGES)


class TestWrongObjects:
    """What is handed to ``fit`` in place of what it takes."""

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (stseg.methods.FixMatch, r"method is the class FixMatch; expected a network, or a method such as"),
            ("fixmatch", r"method is str; expected a network"),
            (stseg.methods.STPlusPlus(), r"method is STPlusPlus; .*STPlusPlus\(\) belong to SelfTrainer"),
        ],
    )
    def test_methods_are_named(self, method, message):
        with pytest.raises(TypeError, match=message):
            stseg.fit(method, [], CONFIG)

    def test_settings_and_log_are_named(self):
        with pytest.raises(TypeError, match=r"config is dict; expected a stseg\.TrainConfig"):
            stseg.fit(nn.Conv2d(3, 2, 1), [], {"steps": 2})
        with pytest.raises(TypeError, match=r"config is dict; expected a stseg\.TrainConfig"):
            stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), num_classes=2, config={"steps": 2})
        with pytest.raises(TypeError, match="log is 'tensorboard'; expected a function"):
            stseg.fit(nn.Conv2d(3, 2, 1), [], CONFIG, log="tensorboard")

    def test_a_loader_is_not_a_data_set(self):
        loader = torch.utils.data.DataLoader([(torch.rand(3, 16, 16), torch.zeros(16, 16, dtype=torch.uint8))] * 4)
        with pytest.raises(TypeError, match=r"expected a data set, got a DataLoader; its \.dataset is one"):
            stseg.fit(nn.Conv2d(3, 2, 1), loader, CONFIG)

    @pytest.mark.parametrize("classes", [1, 2])
    def test_a_network_that_ends_in_a_sigmoid_gives_no_logits(self, classes):
        network = nn.Sequential(nn.Conv2d(3, classes, 1), nn.Sigmoid())
        data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16), dtype=torch.uint8))] * 4
        with pytest.raises(stseg.NetworkError, match=r"cannot leave \[0, 1\]; expected logits .*activation=None"):
            stseg.fit(network, data, CONFIG, progress=False)

    def test_a_folder_of_fit_and_one_of_a_run_are_told_apart(self, tmp_path):
        data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16), dtype=torch.uint8))] * 4
        trainer = stseg.SelfTrainer(
            lambda: nn.Conv2d(3, 2, 1), num_classes=2, config=CONFIG, method="supervised", workdir=tmp_path / "run"
        )
        trainer.fit(data)
        with pytest.raises(stseg.WorkdirMismatchError, match="holds a run of SelfTrainer; use another folder"):
            stseg.fit(nn.Conv2d(3, 2, 1), data, CONFIG, workdir=tmp_path / "run", progress=False)
        stseg.fit(nn.Conv2d(3, 2, 1), data, CONFIG, workdir=tmp_path / "fit", progress=False)
        with pytest.raises(stseg.WorkdirMismatchError, match=r"holds a training of stseg\.fit; use another folder"):
            stseg.SelfTrainer(
                lambda: nn.Conv2d(3, 2, 1), num_classes=2, config=CONFIG, method="supervised", workdir=tmp_path / "fit"
            ).fit(data)

    def test_the_number_of_classes_of_a_critic_is_that_of_the_network(self):
        data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16), dtype=torch.uint8))] * 4
        method = stseg.methods.AdvSSL(nn.Conv2d(3, 2, 1), num_classes=5)
        with pytest.raises(stseg.MethodError, match="num_classes is 5, but the network gives 2 classes"):
            stseg.fit(method, data, CONFIG, unlabeled=[image for image, _ in data], progress=False)

    def test_a_method_that_forgets_the_ignore_index_is_reminded(self):
        class Forgetful(stseg.Method):
            uses_unlabeled = False

            def __init__(self):
                super().__init__()
                self.model = stseg.Segmenter(nn.Conv2d(3, 2, 1))

            def forward(self, batch):
                return stseg.Losses(nn.functional.cross_entropy(self.model(batch.images), batch.masks))

        data = [(torch.rand(3, 8, 8), torch.randint(2, (8, 8), dtype=torch.uint8))] * 4
        with pytest.raises(stseg.MethodError, match=r"masks hold 255 where there is no label: ignore_index="):
            stseg.fit(Forgetful(), data, CONFIG, progress=False)
