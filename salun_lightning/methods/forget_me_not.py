"""Forget-Me-Not: let no part of an image look at the concept."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Kind, Method, part
from salun_lightning.networks.text_to_image import tokens_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.text_to_image import TextToImage


class ForgetMeNot(Method):
    r"""Forget-Me-Not, attention re-steering (Zhang et al., CVPR workshops 2024), for models of prompts.

    .. math::
        \min_\theta E_{D_f, t, \epsilon} \sum_{A} \sum_{h, q, k \in c} A_{hqk}^2

    where :math:`A_{hqk}` is how much place :math:`q` of the noisy image looks at token :math:`k` in head :math:`h` of a layer
    of cross-attention, and :math:`c` are the tokens of the concept. What is drawn in its place is left open. (The released code
    minimises the norm and not its square, which scales the gradient. It may count the end token, too: with Stable Diffusion 1
    that is all padding. And it may first learn an embedding of the concept from images, which is not done here.)

    Raises:
        ValueError: The request names no concepts, or the network has no cross-attention.
    """

    order: Order = "forget"
    kind: Kind = "text-to-image"

    def __init__(self) -> None:
        self._named: Tensor
        self._seen: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("TextToImage", pl_module)
        data, tokenizer = module.datamodule, cast("Any", module.pipeline).tokenizer
        if not data.anchors:
            raise ValueError("The forget request names no concept, which ForgetMeNot needs. Give ForgetConcepts.")
        if not _cross_attention(module.network):
            raise ValueError("ForgetMeNot changes what cross-attention (attn2) looks at, and the network has none.")
        self._named = torch.zeros(module.embedded.tokens.shape[:2], dtype=torch.bool)
        for number in data.anchors:
            prompt = data.class_names[number]
            for place in data.forget.replaced(prompt)[1]:
                self._named[number, list(tokens_of(tokenizer, prompt, place.end, place.start))] = True

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model, forget = cast("TextToImage", module), part(batch, "forget", self)
        noisy, timesteps, _ = model.noised(forget)
        self._release()
        self._hooks = [
            layer.register_forward_pre_hook(self._look, with_kwargs=True) for layer in _cross_attention(model.network)
        ]
        prediction = model.denoise(noisy, timesteps, forget.targets)
        named = self._named[forget.targets.cpu()].to(noisy.device)
        squares = [(seen.float() * named[:, None, None]).square().sum() for seen in self._seen]
        # several processes wait for the gradient of each weight, also of those behind the last layer that looks
        return torch.stack(squares).sum() / len(forget.targets) + 0 * prediction.sum()

    def _look(self, layer: Any, inputs: tuple[Tensor, ...], told: dict[str, Any]) -> None:
        """Compute what the layer is about to look at, (B, heads, places, tokens)."""
        hidden, tokens = inputs[0], told["encoder_hidden_states"]
        queries, keys = layer.head_to_batch_dim(layer.to_q(hidden)), layer.head_to_batch_dim(layer.to_k(tokens))
        self._seen.append(layer.get_attention_scores(queries, keys).unflatten(0, (len(hidden), -1)))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()  # not before, because checkpointed activations are computed again in the backward pass

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._seen.clear()
        while self._hooks:
            self._hooks.pop().remove()


def _cross_attention(network: nn.Module) -> list[nn.Module]:
    return [child for name, child in network.named_modules() if name.endswith("attn2")]
