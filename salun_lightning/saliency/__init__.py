"""Which weights may move. Knows tensors and their names; knows nothing of images, datasets or methods."""

from salun_lightning.saliency.gradients import gradient_sums
from salun_lightning.saliency.mask import SaliencyMask
from salun_lightning.saliency.masking import SaliencyMasking
from salun_lightning.saliency.patch import Patch
from salun_lightning.saliency.scores import Score, saliency_scores
from salun_lightning.saliency.soft_masking import SoftMasking

__all__ = ["Patch", "SaliencyMask", "SaliencyMasking", "Score", "SoftMasking", "gradient_sums", "saliency_scores"]
