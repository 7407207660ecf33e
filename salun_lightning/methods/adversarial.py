"""Images that are moved across a decision boundary."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Predict = Callable[[Tensor], Tensor]
"""Logits (B, classes) of images (B, C, H, W) in [0, 1]."""


def fgsm(predict: Predict, images: Tensor, targets: Tensor, step: float) -> Tensor:
    """One step of a given size, in each pixel, that raises the cross-entropy (Goodfellow et al., ICLR 2015).

    Args:
        predict: The network to be deceived, in eval mode.
        images: The images, in [0, 1], as the result is.
        targets: Their classes.
        step: How far each pixel is moved.

    Raises:
        ValueError: The images do not lie in [0, 1].
    """
    return (_checked(images) + step * _ascent(predict, images, targets).sign()).clamp(0, 1)


def pgd(predict: Predict, images: Tensor, targets: Tensor, radius: Tensor, steps: int = 50) -> Tensor:
    """Projected gradient ascent on the cross-entropy in an L2 ball around each image (Madry et al., ICLR 2018).

    It starts at the image itself, and every step is a tenth of the radius.

    Args:
        predict: The network to be deceived, in eval mode.
        images: The images, in [0, 1], as the result is.
        targets: Their classes.
        radius: The radius of the ball of each image, (B,).
        steps: How many steps.

    Raises:
        ValueError: The images do not lie in [0, 1].
    """
    each = (-1, *[1] * (images.ndim - 1))
    radius = radius.view(each)
    moved = _checked(images)
    for _ in range(steps):
        ascent = _ascent(predict, moved, targets)
        largest = ascent.abs().flatten(1).amax(1).view(each)
        ascent = torch.where(largest > 0, ascent / largest, 0.0)  # the squares of a sure answer's gradient would vanish
        change = moved + 0.1 * radius * ascent / _length(ascent, each) - images
        moved = (images + change * (radius / _length(change, each)).clamp(max=1)).clamp(0, 1)
    return moved


def _checked(images: Tensor) -> Tensor:
    """Images in [0, 1], up to what scaling may add: others would not stay where they are."""
    if images.numel() and (images.min() < -0.1 or images.max() > 1.1):
        raise ValueError(
            "Adversarial images lie in [0, 1], but these are normalised: they go from"
            f" {images.min():.2f} to {images.max():.2f}. Normalise in the network, with salun_lightning.networks.Normalize."
        )
    return images


def _ascent(predict: Predict, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the cross-entropy of each image, with respect to it."""
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):  # whose gradients of sure answers are zero
        images = images.detach().requires_grad_()
        loss = functional.cross_entropy(predict(images).float(), targets, reduction="sum")
        gradient: Tensor = torch.autograd.grad(loss, images)[0]
    return gradient


def _length(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    lengths: Tensor = images.flatten(1).norm(dim=1)
    return lengths.clamp(min=1e-12).view(shape)
