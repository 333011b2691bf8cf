"""S4GAN."""

from __future__ import annotations

import torch
from torch import nn

from stseg.checks import check_nonnegative, check_probability
from stseg.distributed import all_reduce_sum, world_size
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_optimizer
from stseg.functional import adversarial_loss, cross_entropy, one_hot, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import ImageCritic, frozen
from stseg.types import Criterion


class S4GAN(Method):
    """S4GAN (Mittal et al., TPAMI 2019, section 3.1): a critic of images and their label maps.

    The critic scores an image together with a label map; high means "annotated". With h its last features,

    ``L = Ls + matching * |mean h(masks, x_l) - mean h(p_u, x_u)| + semi * CE(p_u, argmax p_u)``.

    The second term is feature matching: the difference of the means over the batch, averaged over the features. The
    last one is self-training on the whole of those unlabeled images whose score, after a sigmoid, is above
    ``threshold``. The critic learns ``(BCE(D(p_u, x_u), 0) + BCE(D(masks, x_l), 1)) / 2``. Both are updated at the same
    time, as in :class:`AdvSSL`.

    Unlike in the authors' code the critic sees the masks of the same batch, not of another one; images are those in
    [0, 1], not rescaled by the extremes of a batch; and label maps are 0 where a pixel has no label or is padding. The
    paper's second branch, a classifier that removes classes at prediction, is shown in ``examples/s4gan.py``.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        num_classes: number of classes, 2 for a network with one logit.
        image_channels: channels of the images.
        matching: weight of feature matching.
        semi: weight of the self-training.
        threshold: least score of an image to learn from: 0.6 for Pascal VOC, 0.7 for Cityscapes.
        dropout: probability that a channel is dropped in the critic.
        critic_lr: learning rate of the critic's Adam, whose betas are 0.9 and 0.99: 1e-5 for Cityscapes.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``matching`` and ``semi`` (both unweighted), ``critic``, and ``trusted``, the share of
    unlabeled images that are learned from.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> method = S4GAN(nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged)
        ['critic', 'matching', 'semi', 'supervised', 'trusted']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        image_channels: int = 3,
        matching: float = 0.1,
        semi: float = 1.0,
        threshold: float = 0.6,
        dropout: float = 0.5,
        critic_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_nonnegative("matching", matching)
        check_nonnegative("semi", semi)
        check_probability("threshold", threshold)
        check_probability("dropout", dropout)
        self.model = as_segmenter(network)
        self.critic = ImageCritic(num_classes + image_channels, dropout=dropout)
        self.num_classes, self.matching, self.semi = num_classes, matching, semi
        self.threshold, self.critic_lr, self.loss = threshold, critic_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer and the critic's."""
        critic = torch.optim.Adam(self.critic.parameters(), lr=self.critic_lr, betas=(0.9, 0.99))
        return [build_optimizer(self.model, config), critic]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled, unlabeled = self.model(batch.images), self.model(batch.unlabeled)
        if labeled.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {labeled.shape[1]} classes")
        valid = torch.ones_like(unlabeled[:, 0], dtype=torch.bool) if batch.valid is None else batch.valid
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)

        predicted = torch.cat([unlabeled.float().softmax(1), batch.unlabeled], 1) * valid[:, None]
        annotated = torch.cat([one_hot(batch.masks, self.num_classes), batch.images], 1)
        judge = frozen(self.critic)
        features, scores = judge(predicted)
        with torch.no_grad():
            real_features, _ = judge(annotated)
        matching = (mean_of_all(real_features).detach() - mean_of_all(features)).abs().mean()

        trusted = scores.detach().sigmoid() > self.threshold
        labels = unlabeled.argmax(1).masked_fill(~(valid & trusted[:, None, None]), ignore)
        semi = cross_entropy(unlabeled, labels, ignore_index=ignore)

        (_, fake), (_, real) = self.critic(predicted.detach()), self.critic(annotated)
        critic = adversarial_loss(fake.reshape(-1, 1, 1, 1), real=False) / 2
        critic = critic + adversarial_loss(real.reshape(-1, 1, 1, 1), real=True) / 2

        total = supervised + self.matching * matching + (self.semi if batch.step > 0 else 0.0) * semi + critic
        parts = {"supervised": supervised, "matching": matching, "semi": semi, "critic": critic}
        parts["trusted"] = trusted.float().mean()
        return Losses(total, {name: part.detach() for name, part in parts.items()})


def mean_of_all(rows: torch.Tensor) -> torch.Tensor:
    """Average the rows of all processes, with gradients whose average over the processes is that of the mean.

    Example:
        >>> mean_of_all(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([2., 3.])
    """
    mine = rows.sum(0)
    count = all_reduce_sum(torch.full((), float(len(rows)), device=rows.device))
    others = all_reduce_sum(mine.detach()) - mine.detach() * world_size()
    return (mine * world_size() + others) / count
