"""Where the mask of a run comes from: scores of its weights, or a mask that is there already."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from salun_lightning.saliency.forget_set import forget_batches
from salun_lightning.saliency.mask import SaliencyMask
from salun_lightning.saliency.scores import Score, check_score, saliency_scores
from salun_lightning.saliency.selection import num_kept
from salun_lightning.weights import fingerprint, weights_of


@dataclass(frozen=True)
class MaskSource:
    """What a mask is made of, as ``SaliencyMasking`` is told.

    Args:
        ratio: The fraction of all weights that may move, of a mask that is computed.
        mask: In place of ``ratio``: a mask, or the file of one.
        score: How salience is measured.
        seed: Seed of the ``random`` score.

    Raises:
        ValueError: ``ratio`` is out of range, not exactly one of ``ratio`` and ``mask`` is given, or there is no such score.
    """

    ratio: float | None
    mask: str | Path | SaliencyMask | None
    score: Score
    seed: int

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.mask is None):
            raise ValueError("SaliencyMasking takes either ratio (compute a mask) or mask (use this one), not both.")
        if self.ratio is not None:
            num_kept(self.ratio, 0)  # refuses what is not a ratio
        check_score(self.score)

    def mask_of(self, trainer: Trainer, module: LightningModule, weights: Mapping[str, nn.Parameter]) -> SaliencyMask:
        """Compute the mask on the forget set, or take the one that is there.

        Args:
            trainer: Whose datamodule or training loader has the forget set.
            module: The module that is trained.
            weights: Those of its weights that the mask is to cover.
        """
        made_from = {
            "network": fingerprint(weights_of(module).items()),
            "data": getattr(trainer.datamodule, "fingerprint", ""),  # type: ignore[attr-defined]
        }
        if self.ratio is not None:
            batches = forget_batches(trainer)
            score: Score = self.score if 0 < self.ratio < 1 else "random"  # none is chosen, or all: nothing need be measured
            scores = saliency_scores(module, batches, score, seed=self.seed, strategy=trainer.strategy, weights=weights)
            if score in {"gradient", "fisher"}:  # others are zero where a weight is
                _warn_of_silent(scores)
            return SaliencyMask.from_scores(scores, self.ratio, {"score": self._score_name, **made_from})
        mask = self._ready_mask(weights)
        for what, value in made_from.items():
            if value and mask.metadata.get(what, value) != value:
                rank_zero_warn(f"The saliency mask was computed with another {what} (same shapes, other values).")
        return mask

    @property
    def _score_name(self) -> str:
        return f"random, seed {self.seed}" if self.score == "random" else self.score

    def _ready_mask(self, weights: Mapping[str, nn.Parameter]) -> SaliencyMask:
        assert self.mask is not None
        mask = self.mask if isinstance(self.mask, SaliencyMask) else SaliencyMask.load(self.mask)
        return mask.fitted(weights)

    def check_restored(self, mask: SaliencyMask, weights: Mapping[str, nn.Parameter]) -> None:
        """Refuse to go on with the mask of a checkpoint when another one is asked for.

        Args:
            mask: The mask of the checkpoint.
            weights: The weights that a mask is to cover.

        Raises:
            MisconfigurationException: It has another ratio or score, or is another one than the mask that is given.
        """
        made, asked = (mask.ratio, mask.metadata.get("score")), (self.ratio, self._score_name)
        if self.ratio is not None and made != asked:
            raise MisconfigurationException(
                f"The checkpoint was made with a saliency mask of ratio {made[0]} by {made[1]}, but ratio {asked[0]} by"
                f" {asked[1]} is asked for. Resume with the same mask, or start afresh."
            )
        if self.mask is not None and self._ready_mask(weights) != mask:
            raise MisconfigurationException(
                "The checkpoint was made with another saliency mask than the one given. Resume with the same mask, or start"
                " afresh."
            )


def _warn_of_silent(scores: Mapping[str, Tensor]) -> None:
    silent = [name for name, score in scores.items() if score.numel() and not score.any()]
    if silent:
        rank_zero_warn(
            f"No gradient of the forget loss reaches {len(silent)} of {len(scores)} weight tensors, such as"
            f" {silent[0]}, so they are the last to be chosen. In a fresh LoRA pair one matrix is zero, and the other has no"
            " gradient: train the pair a little before, or give a mask."
        )
