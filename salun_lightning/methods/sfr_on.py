"""SFR-on: climb on what is remembered best, where it matters more than the rest, between steps on the retain set."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Method, number_of_steps, part
from salun_lightning.saliency import SaliencyMask, gradient_sums
from salun_lightning.saliency.held import Held
from salun_lightning.weights import bits_of, reshard, weights_of, whole_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class SFROn(Method):
    r"""SFR-on (Huang et al., NeurIPS 2024): one step on the forget set, then ``every`` steps on the retain set, and so on.

    Step :math:`s` of :math:`S` on the forget set climbs its weighted loss, the others descend on :math:`E_{D_r} \ell`:

    .. math::
        \max_\theta \alpha_s E_{D_f} w \ell, \quad w \propto \ell^{-\lambda}, \quad
        \alpha_s = \tfrac{\alpha}{2} (1 + \cos(\pi s / S))

    The weights w of a batch have the mean 1, and no gradient. In such a step only those weights of the network move that matter
    at least as much to the forget set: :math:`F_i(D_f) \ge \gamma F_i(D_r)`, the diagonal of the Fisher information of the
    original model, for which each training sample takes a backward pass. (In the released code momentum and weight decay move
    the others as well, and F is the square of the gradient of a batch. Its slow weights, which change nothing with the
    published rate of 1, are left out.)

    Args:
        alpha: :math:`\alpha`, the strength of the ascent at the start.
        power: :math:`\lambda`, how much more the samples count that are remembered better.
        threshold: :math:`\gamma`, how many times more a weight must matter to the forget set.
        every: How many retain steps follow a forget step.

    Raises:
        ValueError: A number is out of its range.
    """

    order: Order = "paired"

    def __init__(self, alpha: float = 25.0, power: float = 0.5, threshold: float = 1.0, every: int = 5) -> None:
        if not (0 <= alpha < math.inf and 0 <= power <= 2 and threshold >= 0 and every >= 0):
            raise ValueError(
                "alpha, threshold and every must not be negative, and power lies between 0 and 2; got alpha"
                f" {alpha}, threshold {threshold}, every {every} and power {power}. Give such as 25, 1, 5 and 0.5."
            )
        self.alpha = alpha
        self.power = power
        self.threshold = threshold
        self.every = every
        self._mask: SaliencyMask | None = None
        self._held: dict[nn.Parameter, Held] = {}
        self._hook: Any = None
        self._forgets = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._mask = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = number_of_steps(self, trainer)
        reshard(pl_module)
        if self._mask is None:  # else a checkpoint brought it
            self._mask = SaliencyMask(self._more_important(cast("UnlearningModule", pl_module)))
        self._held = {weight: Held(weight, self._mask[name]) for name, weight in weights_of(pl_module).items()}
        self._hook = trainer.optimizers[0].register_step_post_hook(self._after_step)

    def _more_important(self, module: "UnlearningModule") -> dict[str, Tensor]:
        data, strategy = module.datamodule, module.trainer.strategy
        forget, retain = (
            gradient_sums(module, data.set_dataloader(name), squared=True, strategy=strategy) for name in ("forget", "retain")
        )
        bound = self.threshold * len(data.forget_indices) / len(data.retain_indices)
        masks = {name: forget[name] >= bound * retain[name] for name in forget}
        return {name: whole_of(mask) for name, mask in masks.items()}

    def forgets(self, step: int) -> bool:
        """Whether a step is one on the forget set."""
        return step % (self.every + 1) == 0

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        trainer, step = module.trainer, module.trainer.global_step
        if not self.forgets(step):
            return module.task_loss(part(batch, "retain", self))
        losses = module.losses(part(batch, "forget", self))
        weights = losses.detach().float().clamp(min=1e-15) ** -self.power
        mean = trainer.strategy.reduce(weights.mean(), reduce_op="mean")
        strength = self.alpha * (1 + math.cos(math.pi * step / self._steps)) / 2
        return -strength * (weights / mean * losses).mean()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._forgets = self.forgets(trainer.global_step)
        if self._forgets:
            for weight, held in self._held.items():
                held.original.copy_(bits_of(weight))
                held.mask_gradient(weight)

    def _after_step(self, *_: Any) -> None:
        if self._forgets:
            for weight, held in self._held.items():
                held.put_back(weight)

    def _release(self, *_: Any, **__: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._held = None, {}

    on_train_end = on_exception = _release

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._mask is None else {"mask": self._mask.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._mask = SaliencyMask.from_state_dict(state_dict["mask"])
