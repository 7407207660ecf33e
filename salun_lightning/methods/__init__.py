"""How a model forgets. One method, one file; pure maths on a module and its batch."""

from salun_lightning.methods.base import Method, Trainee
from salun_lightning.methods.finetune import FineTune
from salun_lightning.methods.gradient_ascent import GradientAscent
from salun_lightning.methods.neg_grad_plus import NegGradPlus
from salun_lightning.methods.random_label import RandomLabel

__all__ = ["FineTune", "GradientAscent", "Method", "NegGradPlus", "RandomLabel", "Trainee"]
