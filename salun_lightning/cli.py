"""The command line: LightningCLI with one extra key, ``saliency:``, and the command ``compare``."""

import sys
import warnings
from pathlib import Path
from typing import Any

USAGE = """\
usage: {program} <command> [options]

commands:
  fit        train, retrain or unlearn one model
  validate   evaluate a checkpoint on the validation sets
  test       measure what a checkpoint still knows: UA, RA, TA, MIA; of a diffusion model UA, entropy, FID and the like
  predict    write what a checkpoint says: class probabilities; of a diffusion model images
  compare    run methods x seeds against a paired retrained model, and report

first steps:
  {program} compare --config configs/digits/compare.yaml
  {program} compare --config configs/digits/diffusion.yaml
  {program} fit --config configs/digits/original.yaml

options of a command:  {program} <command> --help
options of a class:    {program} fit --model.help ImageClassifier
an error in full:      {program} <command> --debug"""


def program() -> str:
    """What commands that are shown begin with: the form in which this process was called."""
    script = Path(sys.argv[0])
    if script.stem == "salun-lightning":
        return "salun-lightning"
    if script == Path(__file__).with_name("__main__.py"):
        return "python -m salun_lightning"
    return "python train.py"


def main(args: list[str] | None = None) -> Any:
    """Run one command, for callers in Python. :func:`console` is for a shell.

    Args:
        args: Command-line arguments, without the name of the program; by default those of this process.

    Returns:
        The ``LightningCLI`` that ran, or what ``compare`` measured.

    Raises:
        ArgumentError: The arguments cannot be understood.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in {"-h", "--help"}:  # without the seconds that the imports below take
        print(USAGE.format(program=program()))
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
