"""How salient each weight is: one pass over the forget set."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from salun_lightning.saliency.gradients import at_least_float32, gradient_sums
from salun_lightning.weights import weights_of

Score = Literal["gradient", "fisher", "snip", "magnitude", "random"]


def saliency_scores(
    module: LightningModule,
    batches: Iterable[Any],
    score: Score = "gradient",
    *,
    seed: int = 0,
    strategy: Strategy | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    weights: Mapping[str, nn.Parameter] | None = None,
) -> dict[str, Tensor]:
    r"""Score every trainable weight by what the forget set says about it.

    - ``gradient``: :math:`|\sum_i \nabla_\theta \ell_f(x_i)|`, the saliency of SalUn (Fan et al., ICLR 2024, section 4): signed
      gradients are summed over the whole forget set, and the magnitude is taken last.
    - ``fisher``: :math:`\sum_i (\nabla_\theta \ell_f(x_i))^2`, the diagonal of the empirical Fisher information; one backward
      pass a sample.
    - ``snip``: :math:`|\theta \cdot \sum_i \nabla_\theta \ell_f(x_i)|` (Lee et al., ICLR 2019).
    - ``magnitude``: :math:`|\theta|`, which does not look at the data.
    - ``random``: uniform numbers, the control.

    The forget loss, the network's mode and what is left as it was are those of ``gradient_sums``. Of batches that are
    dictionaries with the parts ``forget`` and ``retain`` only the former counts: a loss is handed that part, ``training_step``
    a dictionary of that part alone.

    One pass serves any number of ratios: hand the result to :meth:`SaliencyMask.from_scores` once for each.

    Args:
        module: The module whose trainable weights are scored.
        batches: The forget set, in batches of tensors. With several processes each of them iterates over all of it, and they
            share the work.
        score: Which score.
        seed: Seed of the ``random`` score.
        strategy: The strategy the module runs under; None for a module in this process, on its own device.
        loss: Scores another loss than the module's, a mean over its batch.
        weights: Scores these weights of the module alone, by the names that the result is to have.

    Returns:
        A non-negative tensor of each weight's shape, at least float32, by plain weight name; the same on all ranks
        (``DTensor`` where the weight is one).

    Raises:
        ValueError: There is no such score, the forget set is empty, there is no loss or no gradient, or the module is under
            manual optimization and has no ``forget_loss``.
    """
    check_score(score)
    weights = weights_of(module) if weights is None else weights
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    if score == "magnitude":
        return {name: at_least_float32(weight.detach()).abs() for name, weight in weights.items()}
    scores = gradient_sums(module, _forget_parts(batches), score == "fisher", loss, strategy, weights)
    for name, total in scores.items():  # one by one: together they are as large as the network
        scores[name] = (total * weights[name].detach() if score == "snip" else total).abs()
    return scores


def check_score(score: str) -> None:
    """Refuse what is not a :data:`Score`."""
    if score not in get_args(Score):
        raise ValueError(f"Unknown saliency score '{score}'; choose from {', '.join(get_args(Score))}.")


def _forget_parts(batches: Iterable[Any]) -> Iterator[Any]:
    found = False
    for batch in batches:
        if not isinstance(batch, Mapping) or batch.keys().isdisjoint({"forget", "retain"}):
            found = True
            yield batch
        elif "forget" in batch:
            found = True
            yield {"forget": batch["forget"]}
    if not found:
        raise ValueError("The forget set is empty, so there is no saliency. Check the forget request.")
