"""UCE: rewrite what cross-attention reads of a concept, in closed form."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from salun_lightning.methods.base import Kind
from salun_lightning.methods.one_shot import OneShot
from salun_lightning.networks.text_to_image import tokens_of
from salun_lightning.weights import laid_like, weights_of, whole_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.text_to_image import TextToImage


class UCE(OneShot):
    r"""Unified concept editing (Gandikota et al., WACV 2024, equation 7), for models of prompts.

    Keys and values of cross-attention are linear in the embeddings of tokens. Each such weight :math:`W` becomes the one that
    minimises

    .. math::
        s_e \sum_i \| W' c_i - W g_i \|^2 + s_p \sum_j \| W' p_j - W p_j \|^2 + \lambda \| W' - W \|^2

    where :math:`c_i` is the last token of a concept in a prompt that is forgotten and :math:`g_i` that of the anchor in its
    place (the token before it, if the anchor has no words); :math:`p_j` are all tokens of the retained prompts that are
    trained on, and of the empty one. (The released code preserves the last token of each prompt that is named to it.) It is
    solved in double precision.

    Args:
        erase: :math:`s_e`.
        preserve: :math:`s_p`.
        ridge: :math:`\lambda`, which must be positive where few prompts are known.

    Raises:
        ValueError: A number is negative, the request names no anchors, or no weight that would be edited is trained.
    """

    kind: Kind = "text-to-image"

    def __init__(self, erase: float = 1.0, preserve: float = 1.0, ridge: float = 0.5) -> None:
        for name, number in {"erase": erase, "preserve": preserve, "ridge": ridge}.items():
            if not number >= 0:
                raise ValueError(f"{name} must not be negative, got {number}.")
        self.erase = erase
        self.preserve = preserve
        self.ridge = ridge

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        if not module.datamodule.anchors:
            raise ValueError("The forget request names no anchor, which UCE needs. Give ForgetConcepts.")
        concepts, anchors, kept = _tokens(cast("TextToImage", module))
        both = self.erase * concepts.T @ concepts + self.preserve * kept.T @ kept
        eye = torch.eye(both.shape[0], dtype=both.dtype, device=both.device)
        pull = self.erase * (anchors - concepts).T @ concepts  # what is preserved, and the ridge, pull nowhere
        toward = torch.linalg.solve(both + self.ridge * eye, pull, left=False)
        edit = {
            name: laid_like((whole_of(weight.detach()).double() @ toward).to(weight.dtype), weight)
            for name, weight in weights_of(module).items()
            if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
        }
        if not edit:
            raise ValueError("UCE edits attn2.to_k and attn2.to_v, and none is trained. Leave trainable and lora unset.")
        return edit


def _tokens(module: "TextToImage") -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings of concepts and of the anchors in their places (K, D), and of all tokens that are preserved (P, D)."""
    data, tokenizer = module.datamodule, cast("Any", module.pipeline).tokenizer
    tokens = module.embedded.tokens.double()
    concepts, anchors = [], []
    for number in data.anchors:
        prompt = data.class_names[number]
        anchored, places = data.forget.replaced(prompt)
        condition = int(module.anchors(torch.tensor([number])))
        for place in places:
            concepts.append(tokens[number, tokens_of(tokenizer, prompt, place.end)[-1]])
            anchors.append(tokens[condition, tokens_of(tokenizer, anchored, place.anchor_end).stop - 1])
    names = [*data.class_names, ""]
    retained = [*module.retained_classes.tolist(), len(data.class_names)]
    kept = [tokens[number, : len(tokenizer(names[number])["input_ids"])] for number in retained]
    return torch.stack(concepts), torch.stack(anchors), torch.cat(kept)
