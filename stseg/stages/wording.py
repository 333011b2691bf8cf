"""Methods, settings and networks in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stseg.stages.summary import RunSummary

_RECIPES = {
    "Baseline": "supervised: the labeled images alone",
    "ST": "ST: a teacher labels all images, and a student learns from annotated and pseudo-masks",
    "STPlusPlus": "ST++: a teacher labels the images on which its predictions are most stable, a first student the "
    "others, and a second student learns from all",
}
_CURVES = {
    "accuracy": "share of images whose angle is recognized",
    "adversarial": "loss for predictions that the critic tells from true masks, weighted",
    "agreement": "disagreement between the corrector's output and the network's prediction",
    "bad": "share of pixels where the flaw detector finds both networks wrong",
    "consistency": "disagreement between predictions of the same unlabeled images under changes",
    "contrast": "contrastive loss of the features of pixels",
    "corrected": "share of the unlabeled pixels whose class the corrector changes",
    "correction": "loss for flaws that the detector finds in predictions",
    "corrector": "loss of the corrector on labeled images",
    "critic": "loss of the critic, which tells predictions from true masks",
    "cross": "loss of each network with the other one's predictions as labels",
    "detector": "loss of the flaw detector",
    "directed": "share of the common pixels of two crops where one of them learns from the other",
    "features": "loss on unlabeled images with dropped-out features, with pseudo-labels",
    "matching": "difference between features of predictions and of true masks in the critic",
    "reliable": "share of the unlabeled pixels whose pseudo-labels are trusted",
    "rotation": "loss of recognizing by which angle images were turned",
    "semi": "loss on unlabeled images with the trusted pseudo-labels",
    "strong": "loss on strongly augmented unlabeled images, with pseudo-labels",
    "supervised": "loss on labeled images",
    "sure": "share of the unlabeled pixels whose prediction is sure enough to learn from",
    "trusted": "share of the unlabeled images whose predictions are learned from",
    "turned": "loss on turned labeled images",
}
_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


def method_of(run: RunSummary) -> Mapping[str, Any]:
    """Return the recipe of a run and its options, or the method of a run of a single training; empty if not known."""
    recipe = run.settings.get("method", {})
    if recipe.get("type") != "OneStage":
        return recipe  # type: ignore[no-any-return]
    return next((training.method for training in run.trainings.values()), {})


def name_method(run: RunSummary) -> str:
    """Return the name of the method; empty if it is not known."""
    kind = str(method_of(run).get("type", ""))
    return {"Baseline": "supervised", "STPlusPlus": "ST++"}.get(kind, kind)


def describe_method(run: RunSummary) -> str:
    """Return the method in a sentence; empty if it is not known."""
    return _RECIPES.get(str(method_of(run).get("type")), name_method(run))


def describe_options(run: RunSummary) -> str:
    """Return the options of the method that are numbers, words or true, by name."""
    plain = (
        (name, value)
        for name, value in _flat(method_of(run))
        if name.rpartition(".")[2] != "type" and isinstance(value, (bool, int, float, str)) and len(str(value)) <= 60
    )
    return ", ".join(f"{name.replace('_', ' ').replace('.', ' ')} {_short(value)}" for name, value in plain)


def describe_training(run: RunSummary) -> str:
    """Return length, batches and optimization of a training; empty if they are not known."""
    config = run.settings.get("config")
    if not config:
        return ""
    length = f"{config['epochs']} epochs" if config["epochs"] else f"{config['steps']} steps"
    optimizer = _OPTIMIZERS.get(str(config["optimizer"]), "an optimizer of its own")
    each = " each" if len(run.trainings) > 1 else ""
    crop = config["weak"].get("crop_size") if isinstance(config["weak"], dict) else None
    unlabeled = f" and {config['unlabeled_batch_size']} unlabeled ones" if config["unlabeled_batch_size"] else ""
    parts = [
        f"{length}{each}",
        f"batches of {config['batch_size']} images{unlabeled}",
        f"crops of {crop[0]} × {crop[1]} pixels" if crop else "",
        f"{optimizer} with a learning rate of {config['lr']:g}",
        config["precision"],
        f"seed {config['seed']}",
        "the best weights on the validation images" if run.keep == "best" else "the last weights",
    ]
    return ", ".join(part for part in parts if part)


def count_of_parameters(network: Mapping[str, Any]) -> str:
    """Return the number of parameters of a network in words; empty if it is not known."""
    return _count(network["parameters"]) if network else ""


def describe_network(network: Mapping[str, Any]) -> str:
    """Return a network in words; empty if it is not known.

    Example:
        >>> network = {"class": "Unet", "encoder": "resnet18", "parameters": 14_328_209}
        >>> describe_network({**network, "encoder parameters": 11_176_512})
        'Unet with the encoder resnet18: 14.3 million parameters, 11.2 million of them in the encoder'
    """
    if not network:
        return ""
    encoder = f" with the encoder {network['encoder']}" if network["encoder"] else ""
    inner = network["encoder parameters"]
    within = "" if inner is None else f", {_count(inner)} of them in the encoder"
    return f"{network['class']}{encoder}: {_count(network['parameters'])} parameters{within}"


def describe_curve(name: str) -> str:
    """Return the title of the curve of a value that a training logs: its name, and what it is.

    Example:
        >>> describe_curve("supervised"), describe_curve("my own")
        ('supervised: loss on labeled images', 'my own: as logged')
    """
    return "loss (total)" if name == "loss" else f"{name}: {_CURVES.get(name, 'as logged')}"


def show_settings(run: RunSummary) -> dict[str, str]:
    """Return the settings of a run by dotted name, the method and other objects by their names, values as text.

    A method of a single training is described as soon as that has begun.
    """
    found = flatten({**run.settings, "method": method_of(run)}) if run.settings else {}
    return {name.removesuffix(".type"): value for name, value in found.items()}


def flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings by dotted name, their values as text.

    Example:
        >>> flatten({"config": {"lr": 0.1, "weak": {"crop_size": [32, 32]}}})
        {'config.lr': '0.1', 'config.weak.crop_size': '[32, 32]'}
    """
    return {name: str(value) for name, value in _flat(settings)}


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def _short(value: object) -> str:
    """Return a value as text, objects of this package without its name."""
    return str(value).rpartition(".")[2] if str(value).startswith("stseg.") else str(value)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e5 else f"{number:,}"
