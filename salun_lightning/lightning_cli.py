"""LightningCLI for modules that forget."""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

import salun_lightning.data
import salun_lightning.methods
import salun_lightning.modules
import salun_lightning.networks  # noqa: F401  # classes of imported modules can be named without their module
from salun_lightning.callbacks import ImageWriter, PredictionsWriter, SavePipeline
from salun_lightning.cli import program
from salun_lightning.configurations import located, run_folder
from salun_lightning.methods import load_offered
from salun_lightning.methods.finetune import FineTune
from salun_lightning.modules.base import UnlearningModule
from salun_lightning.run_folder import (
    KeepMetrics,
    RunLogger,
    SaveConfig,
    WholeCheckpointIO,
    check_checkpoint_path,
    set_other_run_aside,
)
from salun_lightning.saliency import SaliencyMasking, SoftMasking


class RefuseAccidents(Callback):
    """Refuses what can only be meant otherwise, before anything is trained."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
            if getattr(trainer, name) == 0:
                raise MisconfigurationException(f"--trainer.{name} must be positive, got 0.")
        if (trainer.gradient_clip_val or 0) < 0:
            raise MisconfigurationException(
                f"--trainer.gradient_clip_val must not be negative, got {trainer.gradient_clip_val}."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, UnlearningModule) and trainer.ckpt_path is None and pl_module.original is None:
            method = type(pl_module.method)
            if method is not FineTune and not pl_module.pretrained:
                raise MisconfigurationException(
                    f"{method.__name__} would unlearn random weights, because there is no original model. Give its checkpoint"
                    " with --model.original."
                )
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                rate = float(group.get("lr", 0.0))
                if not math.isfinite(rate) or rate < 0:
                    raise MisconfigurationException(
                        f"The learning rate is {rate}. Give a finite number that is not negative, such as 0.01."
                    )


class Parser(LightningArgumentParser):
    """Writes what it has parsed without checking it again, which takes longer than all else that a small run begins with."""

    @override
    def dump(self, *args: Any, **kwargs: Any) -> str:
        return str(super().dump(*args, **{"skip_validation": True, **kwargs}))


class UnlearningCLI(LightningCLI):
    """LightningCLI, any LightningModule and any LightningDataModule, and ``saliency:``.

    ``trainer.default_root_dir`` is the run folder, by default ``runs/`` and the names of the configurations: the whole
    configuration, the metrics (``metrics.csv``, unless another logger is given) and the last checkpoint
    (``checkpoints/last.ckpt``, each epoch) lie in it, and of a diffusion model also the pipeline directory (``pipeline``).

    Args:
        args: Command-line arguments; by default those of this process.
        **kwargs: See ``LightningCLI``.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        load_offered()
        self._words = args if isinstance(args, list) else sys.argv[1:]
        if isinstance(args, list):
            args, _ = located(args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},  # it saves into the run folder itself
            trainer_defaults={"log_every_n_steps": 1},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"exit_on_error": False},  # whoever called says what is wrong
            args=args,
            **kwargs,
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI warns of arguments of this process beside args; those belong to whoever calls main(args)
        called, sys.argv = sys.argv, sys.argv if args is None else sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = called  # processes of the ddp strategy are started with it
        options = self.config.get(self.config.get("subcommand"), self.config)
        options.pop("search", None)  # it is for the command of that name, and no part of what a run saves
        if options.trainer.default_root_dir is None and options.config:  # here, so that it is saved with the rest
            options.trainer.default_root_dir = str(run_folder(options.config))

    @override
    def _parse_ckpt_path(self) -> None:
        """Check what is measured or resumed, before the seconds that all else takes.

        Lightning would let the hyper-parameters in a checkpoint override the command line, and read the file once more for it.
        """
        command = self.config.get("subcommand")
        if command is None:
            return
        options = self.config[command]
        given, last = options.get("ckpt_path"), self._last_checkpoint(options)
        if options.get("weights_only") is False:
            raise ValueError("--weights_only false would execute what a file holds. Leave it out: that is never done here.")
        if command != "fit" and given is None:
            raise ValueError(
                f"It is not said which model to {command}. Give --ckpt_path {last}, or --ckpt_path original for the model that"
                " training starts from."
            )
        if given == "original":
            if command == "fit":
                raise ValueError("--ckpt_path resumes a run. What fit starts from is given with --model.original.")
            given_model = options.model.init_args
            its_own = isinstance(given_model.get("pipeline"), str)  # by name or folder, it comes with the weights
            if given_model.get("original", "its own weights") is None and not its_own:
                raise ValueError("There is no original model: give its checkpoint with --model.original, or with --ckpt_path.")
            options.ckpt_path = None
        elif given == "last" and command != "fit":
            check_checkpoint_path(last)
        elif given not in (None, "best", "last", "hpc") and not given.startswith("registry"):
            if Path(given).is_dir() and options.trainer.strategy not in ("auto", "ddp"):
                return  # sharded checkpoints are folders
            check_checkpoint_path(given)

    @staticmethod
    def _last_checkpoint(options: Any) -> Path:
        return Path(options.trainer.default_root_dir or ".") / "checkpoints" / "last.ckpt"

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--saliency",
            type=SaliencyMasking | SoftMasking | None,  # the first one is what 'saliency.ratio' alone means
            default=None,
            help="Which weights may move: ratio or mask, score, freeze_buffers; or SoftMasking. Without it, all may.",
        )
        parser.add_argument(
            "--search",
            type=dict[str, Any] | None,
            default=None,
            help="Where the command 'search' looks for good values of options; a run itself does not heed it.",
        )

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (KeyboardInterrupt, SystemExit) as stop:
            command, last = f"{program()} {shlex.join(self._words)}", self._last_checkpoint(self.config[subcommand])
            if subcommand == "fit" and last.is_file():
                command += f" --ckpt_path {shlex.quote(str(last))}"
            stop.add_note(f"It goes on with: {command}")
            raise

    def before_fit(self) -> None:
        """Lose no model that another configuration made."""
        options = self.config["fit"]
        if options.ckpt_path is None and not options.trainer.fast_dev_run and self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            set_other_run_aside(folder, self._parser("fit").dump(options, skip_none=False))

    def after_test(self) -> None:
        """Print each metric once; Lightning's own table (``--verbose true``) repeats them for every loader."""
        for name, value in sorted(self.trainer.callback_metrics.items()):
            print(f"{name:<24} {float(value):9.4f}")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self._get(self.config_init, "trainer")
        folder = options.get("default_root_dir") or "."
        if options.get("logger") is None:  # testing must not overwrite the metrics of training
            kwargs["logger"] = RunLogger(folder) if self.subcommand in (None, "fit") else False
        checkpoint = ModelCheckpoint(
            dirpath=os.path.join(folder, "checkpoints"),  # whatever folder the logger has
            filename="last",
            enable_version_counter=False,
            save_top_k=-1,  # so that none is removed: the new one takes the place of the old
            save_on_train_epoch_end=True,
        )
        given, saliency = options.get("callbacks") or [], self._get(self.config_init, "saliency")
        given = given if isinstance(given, list) else [given]
        kwargs["callbacks"] = [
            RefuseAccidents(),
            KeepMetrics(),
            *given,
            *([] if saliency is None else [saliency]),
            checkpoint,
            PredictionsWriter(),
            *([] if any(isinstance(callback, ImageWriter) for callback in given) else [ImageWriter()]),
            SavePipeline(),
        ]
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # neither the user's nor one of sharded weights
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer
