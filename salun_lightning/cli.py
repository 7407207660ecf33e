"""The command line: LightningCLI with one extra key, ``saliency:``, and the commands beside it."""

import os
import select
import shlex
import sys
import traceback
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any, TextIO

USAGE = """\
usage: {program} <command> [options]

commands:
  fit        train, retrain or unlearn one model
  validate   evaluate a checkpoint on the validation sets
  test       measure what a checkpoint still knows: UA, RA, TA, MIA; of a diffusion model UA, entropy, FID and the like
  predict    write what a checkpoint says: class probabilities; of a diffusion model images
  compare    run methods x seeds against a paired retrained model, and report
  search     find good values for the options of methods, on seeds that comparisons leave out
  configs    list the configurations that ship: tasks, methods, comparisons
  init       copy a task to start from, for images of your own

first steps:
  {program} compare -c digits
  {program} fit -c digits -c digits/original
  {program} fit -c digits -c method/salun
  {program} init my_photos --images FOLDER

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
    return f"python {shlex.quote(str(script))}" if script.name == "train.py" else "python train.py"


def main(args: list[str] | None = None) -> Any:
    """Run one command, for callers in Python. :func:`console` is for a shell.

    Args:
        args: Command-line arguments, without the name of the program; by default those of this process.

    Returns:
        The ``LightningCLI`` that ran, or what ``compare`` measured or ``search`` found.

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
    if words[0] == "search":
        from salun_lightning.search.command import search_command

        return search_command(words[1:])
    if words[0] in {"configs", "init"}:
        from salun_lightning import configurations

        return configurations.command(words)
    from salun_lightning.lightning_cli import UnlearningCLI

    # images in memory are taken a batch at a time where they lie; worker processes could only be slower
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="A `OneCycleLR` scheduler is using")  # see check_cycle
    if words[0] == "test":
        words = ["test", "--verbose=false", *words[1:]]
    return UnlearningCLI(args=words)


def console(args: list[str] | None = None) -> int:
    """Run one command for a shell: an error is one sentence on stderr, and ``--debug`` shows where it was raised.

    Modules in the working directory can be named, in whatever way the program was started.

    Args:
        args: Command-line arguments, without the name of the program; by default those of this process.

    Returns:
        The exit status: 0 if all went well, 2 for a command line that cannot be understood, 1 for any other error, and 128 plus
        the signal's number for what a signal ended.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    status, told = 0, ""
    try:
        try:
            main([word for word in words if word != "--debug"])
        finally:
            sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 141
        if "--debug" in words:
            traceback.print_exc()
        status, told = _ending(error, [word for word in words if word != "--debug"])
    if told:
        rank = os.environ.get("LOCAL_RANK", "0")
        print(f"error{'' if rank == '0' else f' in process {rank}'}: {told}", file=sys.stderr)
    return status


def _nobody_reads(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed: whoever read has seen enough."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _ending(error: BaseException, words: list[str]) -> tuple[int, str]:
    """The exit status, and what is said."""
    again = " ".join(getattr(error, "__notes__", [])) or "It goes on with the same command."
    if type(error).__name__ == "SIGTERMException":  # known by its name, because Lightning takes seconds to import
        return 143, f"Stopped by SIGTERM. {again}"
    if isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)  # Lightning makes this of Ctrl-C
    ):
        return 130, f"Stopped by Ctrl-C. {again}"
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (int(error.code is not None), str(error.code or ""))
    from salun_lightning.sentences import sentence

    return 2 if isinstance(error, ArgumentError) else 1, sentence(error, words)
