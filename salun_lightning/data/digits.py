"""The handwritten digits that scikit-learn ships: 1,797 real images, no download."""

import numpy as np
import torch
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.samples import ImageTensors


class DigitsDataModule(ForgetRetainDataModule):
    """Handwritten digits of 8 x 8 grey pixels (Alpaydin and Kaynak, UCI 1998), from scikit-learn.

    A fixed fifth of each class is the test set.

    Args:
        **kwargs: See ``ForgetRetainDataModule``.
    """

    @override
    def load(self) -> Sources:
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
        targets = torch.from_numpy(digits.target)
        test = torch.zeros(len(targets), dtype=torch.bool)
        draw = np.random.RandomState(0)
        for number in range(10):
            members = (targets == number).nonzero().flatten().numpy()
            test[torch.from_numpy(draw.permutation(members)[: len(members) // 5])] = True
        return Sources(
            ImageTensors(images[~test], targets[~test]),
            ImageTensors(images[test], targets[test]),
            digits.target_names.astype(str).tolist(),
        )
