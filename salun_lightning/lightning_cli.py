"""LightningCLI for modules that forget."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

import salun_lightning.data
import salun_lightning.methods
import salun_lightning.modules
import salun_lightning.networks  # noqa: F401  # classes of imported modules can be named without their module
from salun_lightning.modules import ImageWriter, ProbabilityWriter
from salun_lightning.saliency import SaliencyMasking


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of each command under its own name, so that ``test`` does not overwrite that of ``fit``."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.config_filename = "config.yaml" if stage == "fit" else f"config_{TrainerFn(stage).value}.yaml"
        super().setup(trainer, pl_module, stage)


class UnlearningCLI(LightningCLI):
    """LightningCLI, any LightningModule and any LightningDataModule, and ``saliency:``.

    ``trainer.default_root_dir`` is the run folder: the configuration, the metrics (``metrics.csv``, unless another logger is
    given) and the last checkpoint (``checkpoints/last.ckpt``, each epoch) lie in it, and of a diffusion model also the pipeline
    directory (``pipeline``).

    Args:
        args: Command-line arguments; by default those of this process.
        **kwargs: See ``LightningCLI``.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        checkpoint = ModelCheckpoint(filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [checkpoint, ProbabilityWriter(), ImageWriter()], "log_every_n_steps": 1},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
            **kwargs,
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI warns of arguments of this process beside args; those belong to whoever calls main(args)
        program, sys.argv = sys.argv, sys.argv if args is None else sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = program  # processes of the ddp strategy are started with it

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--saliency",
            type=SaliencyMasking | None,
            default=None,
            help="Which weights may move: ratio or mask, score, freeze_buffers. Without it, all may.",
        )

    def after_fit(self) -> None:
        """Save what diffusers can load, where the module knows how and its weights are not sharded."""
        module: Any = self.model
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                module = callback._average_model.module  # a finished run that is resumed has it only there
        network = getattr(module, "network", None)
        known = hasattr(module, "save_pretrained") and hasattr(getattr(network, "_orig_mod", network), "save_pretrained")
        if known and self.trainer.is_global_zero and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            module.save_pretrained(Path(self.trainer.default_root_dir) / "pipeline")

    def after_test(self) -> None:
        """Print each metric once; Lightning's own table (``--verbose true``) repeats them for every loader."""
        for name, value in sorted(self.trainer.callback_metrics.items()):
            print(f"{name:<24} {float(value):9.4f}")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        folder = trainer.get("default_root_dir") or "."
        if trainer.get("logger") is None:  # testing must not overwrite the metrics of training
            kwargs["logger"] = CSVLogger(folder, name="", version="") if self.subcommand in (None, "fit") else False
        saliency = self._get(self.config_init, "saliency")
        if saliency is not None:
            kwargs["callbacks"] = [*(trainer.get("callbacks") or []), saliency]
        return super().instantiate_trainer(**kwargs)
