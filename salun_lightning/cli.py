"""The command line: LightningCLI with one extra key, ``saliency:``, and the command ``compare``."""

import sys
import warnings
from pathlib import Path
from typing import Any

USAGE = """\
usage: python train.py <command> [options]        (installed: salun-lightning <command> [options])

commands:
  fit        train, retrain or unlearn one model
  validate   evaluate a checkpoint on the validation sets
  test       measure what a checkpoint still knows: UA, RA, TA, MIA; of a diffusion model UA, entropy, FID and the like
  predict    write what a checkpoint says: class probabilities; of a diffusion model images
  compare    run methods x seeds against a paired retrained model, and report

first steps:
  python train.py compare --config configs/digits/compare.yaml
  python train.py compare --config configs/digits/diffusion.yaml
  python train.py fit --config configs/digits/original.yaml

options of a command:  python train.py <command> --help
options of a class:    python train.py fit --model.help ImageClassifier"""


def main(args: list[str] | None = None) -> Any:
    """Run one command.

    Args:
        args: Command-line arguments, without the name of the program; by default those of this process.

    Returns:
        The ``LightningCLI`` that ran, or what ``compare`` measured.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in {"-h", "--help"}:  # without the seconds that the imports below take
        print(USAGE)
        return None
    if words[0] == "compare":
        from salun_lightning.comparison.command import compare_command

        return compare_command(words[1:])
    from salun_lightning.lightning_cli import UnlearningCLI

    # images in memory are taken a batch at a time where they lie; worker processes could only be slower
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    if words[0] == "test":
        words = ["test", "--verbose=false", *words[1:]]
    return UnlearningCLI(args=words)


def program() -> str:
    """How the command line was called, for commands that are shown to be run again."""
    return "salun-lightning" if Path(sys.argv[0]).stem == "salun-lightning" else "python train.py"
