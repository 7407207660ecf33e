"""A run that is broken off leaves a module as another method can use it: Lightning calls no teardown then."""

from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from salun_lightning.methods import DELETE, TSBGRM, Barrier, BoundaryExpanding, Method, SFROn
from salun_lightning.modules import ImageClassifier
from tests.methods.whole_class import data, network
from tests.modules.small_runs import trainer


class BreaksOff(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.frozen = [weight for weight in pl_module.parameters() if not weight.requires_grad]
        self.in_eval = [child for child in pl_module.network.modules() if not child.training]
        self.hooked = [child for child in pl_module.network.modules() if child._forward_pre_hooks]
        raise RuntimeError("broken off")


@pytest.mark.parametrize(
    ("method", "noticed"),
    [
        (Barrier(), "frozen"),
        (TSBGRM(), "in_eval"),
        (DELETE(eval_batch_norm=True), "in_eval"),
        (BoundaryExpanding(), "hooked"),
        (SFROn(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_is_as_it_was_after_a_run_was_broken_off(method: Method, noticed: str | None, tmp_path: Path) -> None:
    breaks = BreaksOff()
    module = ImageClassifier(network(), method=method)
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(tmp_path, max_epochs=2, callbacks=[breaks]).fit(module, datamodule=data())
    assert noticed is None or getattr(breaks, noticed)  # while it ran, this was otherwise
    assert all(weight.requires_grad for weight in module.network.parameters())
    assert all(child.training and not child._forward_pre_hooks for child in module.network.modules())


@pytest.mark.parametrize("method", [SFROn(), TSBGRM()], ids=lambda method: type(method).__name__)
def test_a_run_without_an_end_is_refused_by_what_depends_on_it(method: Method, tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=method)
    with pytest.raises(MisconfigurationException, match=r"depends on how long a run is.*Give max_epochs or"):
        trainer(tmp_path, max_epochs=-1).fit(module, datamodule=data())
