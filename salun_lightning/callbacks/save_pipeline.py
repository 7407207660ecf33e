"""What diffusers can load, at the end of a training."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override


class SavePipeline(Callback):
    """Saves the folder ``pipeline`` in the run folder, where the module knows how and its weights are not sharded.

    A module knows how if it has a method ``save_pretrained(folder)`` and a network that diffusers can save. Others are left
    alone.
    """

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                module = callback._average_model.module  # a finished run that is resumed has it only there
        network = getattr(module, "network", None)
        known = hasattr(module, "save_pretrained") and hasattr(getattr(network, "_orig_mod", network), "save_pretrained")
        if known and trainer.is_global_zero and not isinstance(trainer.strategy, ModelParallelStrategy):
            module.save_pretrained(Path(trainer.default_root_dir) / "pipeline")
