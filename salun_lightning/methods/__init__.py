"""How a model forgets. One method, one file; pure maths on a module and its batch."""

from salun_lightning.methods.base import Denoiser, Method, Trainee
from salun_lightning.methods.esd import ESD
from salun_lightning.methods.finetune import FineTune
from salun_lightning.methods.gradient_ascent import GradientAscent
from salun_lightning.methods.neg_grad_plus import NegGradPlus
from salun_lightning.methods.random_label import RandomLabel
from salun_lightning.methods.remap import Remap
from salun_lightning.methods.selective_amnesia import SelectiveAmnesia

__all__ = [
    "ESD",
    "Denoiser",
    "FineTune",
    "GradientAscent",
    "Method",
    "NegGradPlus",
    "RandomLabel",
    "Remap",
    "SelectiveAmnesia",
    "Trainee",
]
