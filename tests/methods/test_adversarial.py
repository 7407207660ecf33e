"""Moved images, against the closed form of a linear network."""

import pytest
import torch

from salun_lightning.methods.adversarial import fgsm, pgd

# of two classes: the loss of class 0 grows along the difference of the rows
ROWS = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
ALONG = (ROWS[1] - ROWS[0]).view(1, 3, 2, 2)


def predict(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1) @ ROWS.T


def test_pgd_goes_to_the_far_side_of_the_ball_of_each_image() -> None:
    images, radius = torch.full((3, 3, 2, 2), 0.5), torch.tensor([0.1, 0.2, 0.0])
    moved = pgd(predict, images, torch.tensor([0, 1, 0]), radius)
    signed = torch.tensor([0.1, -0.2, 0.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(moved, images + signed * ALONG / ALONG.norm())


def test_pgd_stays_in_the_ball_and_in_the_range_of_images() -> None:
    images = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(1)).round()  # at the ends of the range
    targets, radius = torch.arange(8) % 2, torch.linspace(0.1, 2, 8)
    moved = pgd(predict, images, targets, radius)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert ((moved - images).flatten(1).norm(dim=1) <= radius * 1.0001).all()
    worse = (predict(moved) - predict(images)).gather(1, targets[:, None])
    assert (worse < 0).all()


def test_a_gradient_of_zero_moves_nothing() -> None:
    images = torch.rand(2, 3, 2, 2)
    assert torch.equal(pgd(lambda x: 0 * predict(x), images, torch.tensor([0, 1]), torch.ones(2)), images)


def test_fgsm_moves_each_pixel_by_the_step() -> None:
    images = torch.full((2, 3, 2, 2), 0.5)
    moved = fgsm(predict, images, torch.tensor([0, 1]), 0.1)
    torch.testing.assert_close(moved, images + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1) * ALONG.sign())
    assert set(fgsm(predict, images, torch.tensor([0, 1]), 9.0).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("images", [torch.full((2, 3, 2, 2), -0.2), torch.full((2, 3, 2, 2), 1.5)])
def test_images_that_were_normalised_are_refused(images: torch.Tensor) -> None:
    """They would be cut off at 0 and 1, whatever the step."""
    targets = torch.tensor([0, 1])
    for move in (lambda: fgsm(predict, images, targets, 0.1), lambda: pgd(predict, images, targets, torch.ones(2))):
        with pytest.raises(
            ValueError, match=r"lie in \[0, 1\], but these are normalised: they go from .* Normalise in the network"
        ):
            move()
