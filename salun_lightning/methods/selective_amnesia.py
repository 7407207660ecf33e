"""Selective Amnesia: learn noise in the place of a class, tied to the weights that everything else needs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Kind, Method, part
from salun_lightning.methods.drawn import drawn_by_original, in_batches
from salun_lightning.saliency import gradient_sums
from salun_lightning.weights import laid_like, local_of, plain_name

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.diffusion import Diffusion


class SelectiveAmnesia(Method):
    r"""Selective Amnesia, as continual learning sees it (Heng and Soh, NeurIPS 2023).

    .. math::
        \min_\theta E_{x \sim U[0, 1]} \ell(x, c_f) + \gamma E_{x \sim p_{\theta_o}} \ell(x, c_r)
        + \lambda \sum_i F_i (\theta_i - \theta_{o,i})^2

    Images of noise stand for the forgotten class, images that the original model draws for the retained ones. :math:`F` is the
    diagonal Fisher information of the original model: the square of the gradient of the loss of one image, averaged over drawn
    images of all classes that are trained on. All losses are means over elements here, and that of one image also over
    ``timesteps`` noise levels. (The released code sums over elements and over all 1,000 timesteps, so its lambda of 10 is far
    larger in these units.) Both are computed anew whenever training starts or is resumed, from the same random numbers: as a
    part of every checkpoint, :math:`F` would make it larger by the size of the network.

    Args:
        fisher_weight: :math:`\lambda`.
        replay_weight: :math:`\gamma`.
        images: How many images of each class the original model draws.
        timesteps: At how many noise levels the gradient of one image is taken.

    Raises:
        ValueError: A weight is negative, or a number is not positive.
    """

    order: Order = "forget"
    needs_original = True
    kind: Kind = "diffusion"

    def __init__(self, fisher_weight: float = 1e4, replay_weight: float = 1.0, images: int = 50, timesteps: int = 20) -> None:
        if not (fisher_weight >= 0 and replay_weight >= 0):
            raise ValueError(f"The weights must not be negative, got {fisher_weight} and {replay_weight}.")
        if images < 1 or timesteps < 1:
            raise ValueError(f"images and timesteps must be positive, got {images} and {timesteps}.")
        self.fisher_weight = fisher_weight
        self.replay_weight = replay_weight
        self.images = images
        self.timesteps = timesteps
        self._replay: Samples
        self._tied: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = cast("Diffusion", pl_module)
        drawn = drawn_by_original(model, model.trained_classes, self.images)
        retained = torch.isin(drawn.targets, model.retained_classes.to(drawn.targets.device))
        self._replay = Samples(*(field[retained] for field in drawn))
        with _original_weights(model):
            fisher = gradient_sums(
                model,
                in_batches(drawn, model.datamodule.batch_size),
                squared=True,
                loss=lambda image: model.seeded_loss(_repeated(image, self.timesteps)),
                strategy=trainer.strategy,
            )
        originals = dict(model.reference.named_parameters())
        self._tied = [  # of sharded weights this process has a part
            (weight, local_of(laid_like(originals[name], weight)), local_of(fisher[plain_name(name)]) / len(drawn.targets))
            for name, weight in model.network.named_parameters()
            if weight.requires_grad
        ]

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        forget = part(batch, "forget", self)
        loss = module.unlearned_loss(forget._replace(inputs=torch.rand_like(forget.inputs)))
        if self.replay_weight:
            rows = torch.randint(len(self._replay.targets), (len(forget.targets),), device=forget.targets.device)
            loss = loss + self.replay_weight * module.task_loss(Samples(*(field[rows] for field in self._replay)))
        for weight, original, importance in self._tied:
            loss = loss + self.fisher_weight * (importance * (local_of(weight) - original).square()).sum()
        return loss


@contextmanager
def _original_weights(model: "Diffusion") -> Iterator[None]:
    """The network with the original weights, which it no longer has when training is resumed."""
    now = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    originals = model.reference.state_dict()
    model.network.load_state_dict({name: laid_like(originals[name], tensor) for name, tensor in now.items()})
    try:
        yield
    finally:
        model.network.load_state_dict(now)


def _repeated(samples: Samples, times: int) -> Samples:
    """Each sample several times, with numbers of their own."""
    inputs, targets, indices = (field.repeat_interleave(times, dim=0) for field in samples)
    return Samples(inputs, targets, indices * times + torch.arange(times, device=indices.device).repeat(len(samples.targets)))
