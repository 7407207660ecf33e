"""Which tenth of a task's training set do models memorise? Writes <task>/memorised.txt, a file for ``ForgetIndices``.

An image is memorised as far as models are surer of its class for having been trained on it:

    memorisation = mean probability of its class, over the models that were trained on it
                 - mean probability of its class, over those that were not

(Feldman and Zhang, NeurIPS 2020, who count right answers in place of probabilities). Each model is trained as <task>/retrain
says, with another random 30 % of the training set left out. The images of the validation set are in no training set, so they
have no rank.

    python configs/memorised.py --task digits

With --folder, the answers of each model are kept there: any number of processes may run the same command, and one that was
killed goes on where it was. Further arguments are those of ``fit``, such as --trainer.max_epochs=2.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from salun_lightning.configurations import find
from salun_lightning.files import digest, whole, write_text
from salun_lightning.lightning_cli import UnlearningCLI

HERE = Path(__file__).parent
QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def train_one(task: str, seed: int, folder: str, options: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Train one model, and ask it.

    Returns:
        The positions of the training set, ascending; whether the model was trained on each; and its probability of the class.
    """
    left_out = ["--data.forget=ForgetRandom", "--data.forget.fraction=0.3", f"--data.forget.seed={seed}"]
    once = [f"--trainer.default_root_dir={folder}", "--trainer.limit_val_batches=0", f"--seed_everything={seed}"]
    configs = [f"--config={task}", f"--config={task}/retrain"]
    cli = UnlearningCLI(args=[*configs, *left_out, *once, *QUIET, *options], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    asked = cli.model.predictions.training
    return asked.indices, torch.isin(asked.indices, cli.datamodule.retain_indices), asked.confidences.double()


def train_all(task: str, seeds: range, folder: Path, options: list[str]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Train a model for each seed, unless its answers lie in the folder, or another process trains it."""
    settings = [file.read_text(encoding="utf-8") for file in (find(task), find(f"{task}/retrain")) if file is not None]
    files = [folder / f"{seed}-{digest([task, settings, options])}.pt" for seed in seeds]
    folder.mkdir(parents=True, exist_ok=True)
    for wait in (False, True):
        for seed, file in zip(seeds, files, strict=True):
            try:
                with FileLock(f"{file}.lock").acquire(blocking=wait), TemporaryDirectory() as run:
                    if not file.is_file():
                        with whole(file) as unfinished:
                            torch.save(train_one(task, seed, run, options), unfinished)
            except Timeout:
                continue  # another process trains it
    return [torch.load(file) for file in files]


def memorisation(inside: Tensor, of_class: Tensor) -> Tensor:
    """How far each image is memorised (N,); NaN if all models were trained on it, or none.

    Args:
        inside: Which models were trained on which images, bool of shape (models, N).
        of_class: Their probabilities of the classes of the images (models, N).
    """
    means = [(of_class * group).sum(0) / group.sum(0) for group in (inside, ~inside)]
    return means[0] - means[1]


def top(scores: Tensor) -> Tensor:
    """The places of the tenth with the largest scores, ascending; of equal scores the first."""
    return scores.nan_to_num(-1.0).sort(descending=True, stable=True).indices[: len(scores) // 10].sort().values


def main(args: list[str] | None = None) -> None:
    """Train the models, write the file, and print what it holds."""
    parser = argparse.ArgumentParser(description="Which tenth of a task's images do models memorise?", allow_abbrev=False)
    parser.add_argument("--task", default="digits", help="configuration of the task; <task>/retrain lies beside it")
    parser.add_argument("--models", type=int, default=24, help="how many models to train")
    parser.add_argument("--seed", type=int, default=10_000, help="seed of the first model; each has the next one")
    parser.add_argument("--out", type=Path, help="the file to write; by default <task>/memorised.txt beside this script")
    parser.add_argument("--folder", type=Path, help="where the answers of the models are kept; by default nowhere")
    own, options = parser.parse_known_args(args)
    torch.set_num_threads(1)  # networks this small are fastest so, and sums depend on it
    with TemporaryDirectory() as nowhere:
        trained = train_all(own.task, range(own.seed, own.seed + own.models), own.folder or Path(nowhere), options)
    (positions, *_), inside, of_class = (torch.stack(part) for part in zip(*trained, strict=True))
    scores = memorisation(inside, of_class)
    chosen, half = top(scores), own.models // 2
    halves = [top(memorisation(inside[models], of_class[models])) for models in (slice(half), slice(half, None))]
    rest = torch.ones_like(scores, dtype=torch.bool).index_fill(0, chosen, False)
    head = (
        f"The {len(chosen)} of {len(positions)} training images of {own.task} that {own.models} models memorise most.",
        f"Mean memorisation: {scores[chosen].nanmean():.3f}, of the others {scores[rest].nanmean():.3f}.",
        f"Seeds from {own.seed}; made by memorised.py. Positions hold for val_fraction 0.1 and split_seed 0.",
    )
    write_text(
        own.out or HERE / own.task / "memorised.txt",
        "".join(f"# {line}\n" for line in head) + "".join(f"{n}\n" for n in positions[chosen].tolist()),
    )
    alike = torch.isin(*halves).double().mean()
    print(*head[:2], f"Of the tenth by the first half of the models, {alike:.0%} are in that by the second half.", sep="\n")


if __name__ == "__main__":
    main()
