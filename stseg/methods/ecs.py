"""ECS: error-correcting supervision."""

from __future__ import annotations

import torch
from torch import nn

from stseg.checks import check_nonnegative, check_positive
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_critic_optimizer, build_optimizer
from stseg.errors import NetworkError
from stseg.functional import cross_entropy, mean_over_processes, sigmoid_rampup, supervised_loss
from stseg.models.segmenter import Segmenter, as_segmenter, takes_images
from stseg.models.state import check_apart
from stseg.modules import frozen
from stseg.types import Criterion


class ECS(Method):
    """ECS (Mendel et al., ECCV 2020): a second network that finds and corrects the errors of the first.

    **A reconstruction**: there is no public code of the authors, and this was not compared with the text of the paper.
    Known from its abstract and introduction is what the two networks do: the corrector judges whether an image and its
    segmentation agree, learns on labeled images to find correct predictions and to amend wrong ones, and regularizes
    the segmentation network on labeled images; on unlabeled images its output, combined with the prediction, is the
    new target, and pixels are weighted by its certainty. Not verified are the formulas: what the corrector sees and
    returns, all losses below and their denominators, every default, and that both networks are updated at the same
    time. Results are not those of the paper.

    The corrector C maps an image and its K predicted probabilities p to K + 1 classes: class K means "the prediction is
    right", the others "it should be this class". With y the mask,

    - the corrector learns ``CE(C(x_l, p_l), K where argmax p_l is y, else y)``, with detached p;
    - the segmentation network learns ``Ls + agreement * CE(C(x_l, p_l), K) + semi * r(t) * Lu``, the second term
      through the corrector with fixed parameters: it is rewarded for what the corrector holds for right;
    - ``Lu`` is the mean over the valid pixels of ``w * CE(p_u, t)``, where the corrector's most probable class is the
      target t, or argmax p_u where that class is K, and w is the probability of that class.

    r(t) is the ramp of Mean Teacher. Pixels without a label and padding are ignored.

    Args:
        network: the segmentation network, bare or in a :class:`stseg.Segmenter`.
        corrector: a network from as many channels as images and classes have together to ``num_classes + 1`` logits,
            such as ``smp.Unet(in_channels=3 + 21, classes=22)``. A bare one is given images in [0, 1], which are not
            normalized.
        agreement: weight of the reward on labeled images, 0 or more.
        semi: final weight of the corrected targets on unlabeled images, 0 or more.
        rampup: share of the training until that weight is reached; 0 for no ramp-up.
        corrector_lr: learning rate of the corrector's Adam, whose betas are 0.9 and 0.99.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``agreement``, ``semi`` and ``corrector``, all unweighted, and ``corrected``, the share of
    valid unlabeled pixels whose class the corrector changes.

    Raises:
        ValueError: if both networks share parameters, or a setting is out of its range; when called, if the corrector
            does not return a class more than the network.

    Example:
        >>> method = ECS(nn.Conv2d(3, 2, 1), nn.Conv2d(3 + 2, 2 + 1, 1))
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['agreement', 'corrected', 'corrector', 'semi', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        corrector: nn.Module,
        *,
        agreement: float = 0.1,
        semi: float = 1.0,
        rampup: float = 0.1,
        corrector_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_apart(network=network, corrector=corrector)
        for name, value in (("agreement", agreement), ("semi", semi), ("rampup", rampup)):
            check_nonnegative(name, value)
        check_positive("corrector_lr", corrector_lr)
        self.model = as_segmenter(network)
        self.corrector = corrector if takes_images(corrector) else Segmenter(corrector, mean=None, std=None)
        self.agreement, self.semi, self.rampup = agreement, semi, rampup
        self.corrector_lr, self.loss = corrector_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer and the corrector's."""
        corrector = build_critic_optimizer(self.corrector, self.corrector_lr)
        return [build_optimizer(self.model, config), corrector]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled, unlabeled = self.model(batch.images), self.model(batch.unlabeled)
        num_classes = labeled.shape[1]
        seen = torch.cat([batch.images, labeled.softmax(1)], 1)
        known = batch.masks != ignore
        valid = torch.ones_like(unlabeled[:, 0], dtype=torch.bool) if batch.valid is None else batch.valid

        try:
            judgment = self.corrector(seen.detach())
        except NetworkError as error:
            colors = batch.images.shape[1]
            raise NetworkError(
                f"the corrector cannot take {colors + num_classes} channels, those of the image ({colors}) and of the "
                f"classes ({num_classes}); expected a network made with in_channels={colors + num_classes}: {error}"
            ) from error
        if judgment.shape[1] != num_classes + 1:
            raise ValueError(
                f"the corrector gives {judgment.shape[1]} classes and the network {num_classes}; expected "
                f"{num_classes + 1}: a class more than the network"
            )
        right = torch.where(known, num_classes, VOID)
        true = torch.where(known, batch.masks, VOID)
        corrector = cross_entropy(judgment, torch.where(labeled.argmax(1) == true, right, true), ignore_index=VOID)

        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        agreement = cross_entropy(frozen(self.corrector)(seen), right, ignore_index=VOID)

        prediction = unlabeled.argmax(1)
        with torch.no_grad():
            correction = self.corrector(torch.cat([batch.unlabeled, unlabeled.softmax(1)], 1)).softmax(1)
        certainty, target = correction.max(1)
        target = torch.where(target == num_classes, prediction, target)
        semi = cross_entropy(unlabeled, torch.where(valid, target, ignore), weight=certainty, ignore_index=ignore)
        changed = (valid & (target != prediction)).sum()

        factor = self.semi * sigmoid_rampup(batch.step, self.rampup * batch.steps)
        total = supervised + self.agreement * agreement + factor * semi + corrector
        parts = {"supervised": supervised, "agreement": agreement, "semi": semi, "corrector": corrector}
        logged = {name: part.detach() for name, part in parts.items()}
        return Losses(total, {**logged, "corrected": mean_over_processes(changed.float(), valid.sum())})


VOID = -100
"""Where the corrector's target has no label: never a class, unlike the ignore index, which may be its last."""
