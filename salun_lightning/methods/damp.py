"""DAMP: make each stage of a network blind to the direction in which a class differs from all others."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from salun_lightning.methods.base import Kind, on_device
from salun_lightning.methods.one_shot import OneShot
from salun_lightning.methods.whole_classes import forgotten_classes
from salun_lightning.networks.stages import given_to, stages_of
from salun_lightning.saliency.rehearsal import undisturbed
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

_PROBED = 1000
_SMALL = 1e-6


class DAMP(OneShot):
    r"""Depth-aware modulation by projection (Hatami, Aalishah and Monosov, CVPR workshops 2026), without any training.

    .. math::
        W_\ell \leftarrow W_\ell (I - \alpha_\ell Q_\ell Q_\ell^\top), \quad
        d_f = \mu_f - R R^+ \mu_f, \quad \alpha_\ell = \min(1, \max(0, 2 a_\ell - 1)) \, \ell / L

    :math:`\mu_f` is the mean of what stage :math:`\ell` of :math:`L` is given for a forgotten class, the columns of :math:`R`
    are those of the retained classes, and :math:`Q_\ell` is an orthonormal basis of the residuals :math:`d_f`: what retained
    classes have in common with it stays. :math:`a_\ell` is the accuracy with which a linear probe tells forget and retain set
    apart. Biases stay. A stage that is given no more channels than there are retained classes is hardly edited.

    No code was released, and the factor :math:`\alpha_\ell` is taken from a summary. Our own are: the mean over positions and
    tokens as the input of a stage, and the projection of the input channels for each tap of a kernel; what begins a stage (see
    ``stages_of``); and a probe by ridge regression on standardised inputs of up to 1,000 samples of each set, half of them held
    out, with balanced accuracy. For single images there is no such direction, so the method is for whole classes.

    Args:
        strength: Multiplies each :math:`\alpha_\ell`; the published method has 1.
        layers: In place of our rule: the layers to edit, a regular expression that is searched in their plain names.

    Raises:
        ValueError: ``strength`` is not between 0 and 1, no class is forgotten whole, or there is no such layer.
        MisconfigurationException: In no stage does a forgotten class differ from what the retained ones span.
    """

    kind: Kind = "classifier"

    def __init__(self, strength: float = 1.0, layers: str | None = None) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie between 0 and 1, got {strength}. The published method has 1.")
        self.strength = strength
        self.layers = layers

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        forgotten_classes(self, module)
        data, names = module.datamodule, {weight: name for name, weight in weights_of(module).items()}
        edit: dict[str, Tensor] = {}
        with undisturbed(module), torch.no_grad():
            network = getattr(module.network, "_orig_mod", module.network)  # not to compile it again for the hooks
            (probe,) = on_device(module, [data.probe()])
            stages = stages_of(network, probe.inputs, self.layers)
            layers = [stage[0].layer for stage in stages]
            forget, retain = (
                given_to(layers, network, on_device(module, data.set_dataloader(name)), math.ceil(count / _PROBED))
                for name, count in (("forget", len(data.forget_indices)), ("retain", len(data.retain_indices)))
            )
        for depth, (layer, stage) in enumerate(zip(layers, stages, strict=True), start=1):
            basis = _residuals(forget[layer].means, retain[layer].means)
            alpha = self.strength * depth / len(stages) * _separability(forget[layer].some, retain[layer].some)
            weights = [operator.layer.get_parameter("weight") for operator in stage]
            for weight in weights if basis.shape[1] else []:
                if weight in names:
                    seen = torch.einsum("oi...,ik,jk->oj...", weight.detach().cpu().double(), basis, basis)
                    edit[names[weight]] = (-alpha * seen).to(weight)
        if not edit:
            raise MisconfigurationException(
                f"In none of {len(stages)} stages does a forgotten class differ from what the retained ones span, so DAMP has"
                " nothing to take away. Choose a wider network, other layers, or another method."
            )
        return edit


def _residuals(forget: Tensor, retain: Tensor) -> Tensor:
    """An orthonormal basis of what is left of the forgotten means without the span of the retained ones, as columns."""
    rest = forget - retain @ (torch.linalg.pinv(retain, rtol=_SMALL) @ forget)
    basis, lengths, _ = torch.linalg.svd(rest, full_matrices=False)
    left: Tensor = basis[:, lengths > _SMALL * forget.norm()]
    return left


def _separability(forget: Tensor, retain: Tensor) -> float:
    """How well a linear probe tells two sets apart that it has not seen: from 0, by chance, to 1."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(len(forget), len(retain)) < 2:
        raise ValueError("DAMP holds out half of each set, so it needs two images to forget and two to retain at least.")
    seen, held_out = (np.concatenate([forget[first::2], retain[first::2]]) for first in (0, 1))
    labels = [np.repeat([1, 0], [len(forget[first::2]), len(retain[first::2])]) for first in (0, 1)]
    probe = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced")).fit(seen, labels[0])
    return float(np.clip(2 * balanced_accuracy_score(labels[1], probe.predict(held_out)) - 1, 0, 1))
