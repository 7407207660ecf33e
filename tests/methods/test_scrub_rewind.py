"""SCRUB+R: which epoch it goes back to, that checkpoints hold it, and that a resumed run does likewise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from salun_lightning.data import ForgetClasses
from salun_lightning.methods import SCRUB, ScrubRewind
from salun_lightning.modules import ImageClassifier
from tests.methods.plain_runs import frozen_run_moves_nothing, network, settings
from tests.modules.small_runs import same, trainer, weights
from tests.small import small_datamodule

ASCENT = {"ascent_epochs": 2, "gamma": 1.0, "temperature": 2.0}


class Kept(Callback):
    """The network after each epoch, before anything is rewound, and its errors by a plain loop."""

    def __init__(self) -> None:
        self.networks: list[dict[str, Tensor]] = []
        self.errors: list[tuple[float, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.networks.append(weights(pl_module.network))
        asked, data = network(), pl_module.datamodule
        asked.load_state_dict(self.networks[-1])
        asked.eval()
        wrong = {}
        for name, positions in (("forget", data.forget_indices), ("val", data._sets["val"][2])):
            images = positions.float()[:, None, None, None].expand(-1, 1, 4, 4) / 255
            classes = positions % 3
            wrong[name] = ((asked(images).argmax(1) != classes).double(), classes)
        forgotten, reference = wrong["forget"][1], 0.0
        for number in range(3):
            share = (forgotten == number).double().mean()
            if share:
                reference += float(share * wrong["val"][0][wrong["val"][1] == number].mean())
        self.errors.append((float(wrong["forget"][0].mean()), reference))


def rewound(folder: Path, method: SCRUB, epochs: int = 6, **kwargs: Any) -> tuple[ImageClassifier, Kept]:
    given: Mapping[str, Any] = {"callbacks": [], "ckpt_path": None, "data": {}, **kwargs}
    module, kept = ImageClassifier(network(), method=method, optimizer=settings), Kept()
    last = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    options = {"max_epochs": epochs, **given.get("options", {})}
    runner = trainer(folder, callbacks=[kept, *given["callbacks"], last], enable_checkpointing=True, **options)
    data = small_datamodule(**{"val_fraction": 0.2, **given["data"]})
    runner.fit(module, datamodule=data, ckpt_path=given["ckpt_path"], weights_only=True)
    return module, kept


def chosen(kept: Kept, reference: float | None = None) -> int:
    wanted = kept.errors[-1][1] if reference is None else reference
    distances = [abs(error - wanted) for error, _ in kept.errors]
    return max(epoch for epoch, distance in enumerate(distances) if distance == min(distances))


@pytest.mark.parametrize("forget", [None, ForgetClasses([0, 2])])
@pytest.mark.parametrize("options", [{}, {"max_epochs": -1, "max_steps": 42}])
def test_it_goes_back_to_the_epoch_that_is_closest(tmp_path: Path, forget: Any, options: dict[str, int]) -> None:
    module, kept = rewound(tmp_path, ScrubRewind(**ASCENT), data={"forget": forget}, options=options)
    assert len({error for error, _ in kept.errors}) > 1
    assert same(weights(module.network), kept.networks[chosen(kept)])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    prefix = "network."
    of_network = {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
    assert same(of_network, kept.networks[chosen(kept)])
    assert saved["epoch"] == len(kept.networks) - 1


@pytest.mark.parametrize("reference", [0.0, 0.4, 1.0])
def test_a_reference_error_of_ones_own_needs_no_validation_set(tmp_path: Path, reference: float) -> None:
    module, kept = rewound(tmp_path, ScrubRewind(reference, **ASCENT), data={"val_fraction": 0.05})
    assert same(weights(module.network), kept.networks[chosen(kept, reference)])


def test_the_epochs_are_those_of_scrub(tmp_path: Path) -> None:
    _, kept = rewound(tmp_path, ScrubRewind(**ASCENT))
    _, plain = rewound(tmp_path, SCRUB(**ASCENT))
    assert len(kept.networks) == len(plain.networks) == 6
    assert all(same(one, other) for one, other in zip(kept.networks, plain.networks, strict=True))


@pytest.mark.parametrize("over", [False, True], ids=["killed", "was over"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, over: bool) -> None:
    """Also one that was over, and rewound, and now gets more epochs."""

    class Kill(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                raise KeyboardInterrupt

    whole, kept = rewound(tmp_path / "whole", ScrubRewind(**ASCENT))
    if over:
        rewound(tmp_path, ScrubRewind(**ASCENT), epochs=3)
    else:
        with pytest.raises(SystemExit):
            rewound(tmp_path, ScrubRewind(**ASCENT), callbacks=[Kill()])
    resumed, rest = rewound(tmp_path, ScrubRewind(**ASCENT), ckpt_path=tmp_path / "last.ckpt")
    assert len(rest.networks) == 3
    assert all(same(one, other) for one, other in zip(rest.networks, kept.networks[3:], strict=True))
    assert same(weights(resumed.network), weights(whole.network))


def test_a_run_that_is_stopped_goes_back_as_well(tmp_path: Path) -> None:
    stop = EarlyStopping("train/loss", patience=0, mode="max", check_on_train_epoch_end=True, min_delta=1e9)
    module, kept = rewound(tmp_path, ScrubRewind(1.0, **ASCENT), callbacks=[stop])
    assert len(kept.networks) == 2
    assert same(weights(module.network), kept.networks[chosen(kept, 1.0)])


def test_a_class_without_validation_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"class \d has none\. Give the datamodule a larger val_fraction, or a"):
        rewound(tmp_path, ScrubRewind(), data={"val_fraction": 0.0})


def test_a_mask_of_nothing(tmp_path: Path) -> None:
    frozen_run_moves_nothing(tmp_path, ScrubRewind(ascent_epochs=1))


@pytest.mark.parametrize("reference", [-0.1, 1.1, float("nan")])
def test_no_error(reference: float) -> None:
    with pytest.raises(ValueError, match=r"^reference_error must lie between 0 and 1, got .*\. Leave it out to measure it\."):
        ScrubRewind(reference)
