"""What classifiers answer: how far two of them are apart, and which samples one is right about."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.evidence.measures import right
from salun_lightning.methods.base import on_device
from salun_lightning.networks.head import head_of
from salun_lightning.saliency.rehearsal import undisturbed

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


def classification_head(module: "UnlearningModule") -> tuple[str, nn.Linear]:
    """The layer that makes the logits of a classifier, and its plain name; see ``head_of``.

    Args:
        module: The module that is trained.

    Raises:
        ValueError: There is none.
    """
    with undisturbed(module), module.trainer.strategy.precision_plugin.forward_context():
        (probe,) = on_device(module, [module.datamodule.probe()])
        return head_of(module.network, probe.inputs)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`KL(\text{softmax}(t / T) \| \text{softmax}(s / T))` of each sample, (B,).

    Args:
        student: Logits :math:`s`, (B, C).
        teacher: Logits :math:`t`, (B, C); minus infinity for what has no probability.
        temperature: :math:`T`.

    Example:
        >>> divergence(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]))  # log 2
        tensor([0.6931])
    """
    predicted = functional.log_softmax(student / temperature, 1)
    return functional.kl_div(predicted, functional.softmax(teacher / temperature, 1), reduction="none").sum(1)


def rightness(module: "UnlearningModule", name: str, original: bool = False) -> tuple[Tensor, Tensor]:
    """Which samples of a set the network is right about, in eval mode and without augmentation, and nothing is changed.

    It is asked in every process, and the answers of the first one count: all processes go by the same.

    Args:
        module: The classifier that is trained.
        name: The set, see ``set_dataloader`` of the datamodule.
        original: Ask the original network.

    Returns:
        Bool (N,), and the classes of the samples (N,), both on the CPU; empty where there is no such set.
    """
    model, strategy = cast("ImageClassifier", module), module.trainer.strategy
    found, classes = [torch.empty(0, dtype=torch.bool)], [torch.empty(0, dtype=torch.int64)]
    with undisturbed(module), torch.no_grad(), strategy.precision_plugin.forward_context():
        for samples in on_device(module, module.datamodule.set_dataloader(name)):
            found.append(right(model.logits(samples.inputs, original), samples.targets).cpu())
            classes.append(samples.targets.cpu())
    answers: tuple[Tensor, Tensor] = strategy.broadcast((torch.cat(found), torch.cat(classes)))
    return answers
