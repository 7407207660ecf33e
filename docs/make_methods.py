"""Writes docs/methods.md from the methods that ship: ``python docs/make_methods.py``."""

import ast
import inspect
import io
import logging
import re
import sys
import tempfile
import tokenize
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from salun_lightning.comparison.observers import Passes
from salun_lightning.configurations import SHIPPED
from salun_lightning.data import ForgetClasses, ForgetConcepts, ForgetRetainDataModule, ImageTensors
from salun_lightning.methods import AMUN, Method, OneShot
from salun_lightning.modules import ClassDiffusion, ImageClassifier, TextToImage
from salun_lightning.modules.base import UnlearningModule
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks.text_to_image import small_text_to_image

PAGE = Path(__file__).with_name("methods.md")
TITLE = "# Methods"
INTRO = """\
This page is made from the methods themselves, by `python docs/make_methods.py`. Each runs with or without a saliency mask:
`python train.py fit -c digits -c method/salun`. [Own method](own_method.md) says how to write another.

- **for**: classifiers, diffusion models of either kind, text-to-image models alone, or all of them.
- **data**: the sets that it reads while it trains or computes its edit.
- **original**: whether a frozen copy of the original model is kept beside the trained one.
- **once**, **per epoch**: what it costs. 1 is what an epoch of ordinary training on the whole training set costs, measured in
  passes of one sample through the network where a tenth is to be forgotten. A backward pass counts twice. *once* is before the
  first step. A saliency mask costs 0.1 more, once. Gradients of single samples take longer than those of batches, which is not
  counted.
- **lines**: of code in its file.
"""
COLUMNS = ("method", "published", "for", "data", "original", "once", "per epoch", "lines")
_CITED = re.compile(
    r"[A-Z][\w'-]+(?: et al\.|(?:, [A-Z][\w'-]+)* and [A-Z][\w'-]+), [A-Za-z][^();]*?\b(?:\d{4}\.\d{5}|\d{4})\b"
    r"|arXiv \d{4}\.\d{5}"
)
_COUNT, _FORGOTTEN, _CLASSES = 200, 0, 10
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass
class Shipped:
    """A configuration of a method."""

    name: str
    content: dict[str, Any]
    comment: str
    arguments: dict[str, Any]
    """What the module is made with, the method among them."""

    @property
    def method(self) -> Method:
        """How it forgets."""
        method: Method = self.arguments["method"]
        return method

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return type(self.method)

    @property
    def title(self) -> str:
        """What the comment begins with."""
        return re.sub(r",? (for )?(classifiers|diffusion|a concept)( and whole classes)?$", "", self.comment.partition(":")[0])


_KEYS = ("model.method", "model.optimizer", "model.trainable")


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.method", type=Method)
    parser.add_argument("--model.optimizer", type=OptimizerCallable, default=torch.optim.SGD)
    parser.add_argument("--model.trainable", type=str | None, default=None)
    return parser


def shipped() -> list[Shipped]:
    """Every configuration of a method, by name."""
    found = []
    for path in sorted((SHIPPED / "method").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        chosen = {key: value for key, value in content.items() if key in _KEYS}
        made = _parser().instantiate(_parser().parse_object(chosen)).model
        found.append(Shipped(path.stem, content, text.splitlines()[0].removeprefix("# "), vars(made)))
    return found


class _Watch(Callback):
    """Notes the passes until each epoch ends, and which sets are read."""

    def __init__(self, passes: Passes) -> None:
        self.passes, self.counts, self.read, self.prepared = passes, list[int](), set[str](), set[str]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, whole = trainer.datamodule, trainer.datamodule.set_dataloader  # type: ignore[attr-defined]
        data.set_dataloader = lambda name: (self.read.add(name), whole(name))[1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.counts:
            self.counts, self.prepared = [self.passes.number], {*self.read}  # what came before the first step
        if not isinstance(pl_module.method, OneShot):
            self.read |= batch.keys()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.append(self.passes.number)


def _of_prompts(one: Shipped) -> bool:
    """Whether it needs a concept and its anchor."""
    return one.method.kind == "text-to-image" or getattr(one.method, "to", None) == "anchor"


def _data(prompts: bool) -> ForgetRetainDataModule:
    """Images of which one class, a tenth, is to be forgotten, and a fifth of each class is for validation."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_COUNT, 1, 8, 8), dtype=torch.uint8, generator=draw)
    images = ImageTensors(pixels, torch.arange(_COUNT) % _CLASSES)
    request = ForgetConcepts({_WORDS[_FORGOTTEN]: _WORDS[-1]}) if prompts else ForgetClasses([_FORGOTTEN])
    return ForgetRetainDataModule(request, images, images, class_names=_WORDS, val_fraction=0.2, batch_size=8)


def _module(one: Shipped) -> UnlearningModule:
    """A small model of a kind that the method is for."""
    torch.manual_seed(0)
    if _of_prompts(one):
        pipeline = small_text_to_image(" ".join(_WORDS), height=8, width=8)
        return TextToImage(pipeline, sampling=Sampling(steps=50), **one.arguments)
    if one.method.kind != "diffusion":
        layers = {"conv": nn.Conv2d(1, 4, 3), "relu": nn.ReLU(), "pool": nn.AvgPool2d(3), "flat": nn.Flatten()}
        return ImageClassifier(nn.Sequential(OrderedDict(layers, head=nn.Linear(16, _CLASSES))), **one.arguments)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (4, 4)}
    unet = UNet2DModel(
        8, 1, 1, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, num_class_embeds=_CLASSES + 1, **blocks
    )
    return ClassDiffusion(unet, DDPMScheduler(), null_class=_CLASSES, sampling=Sampling(steps=50), **one.arguments)


def measured(one: Shipped) -> tuple[set[str], str, str]:
    """Which sets a method reads, and its cost once and per epoch, 1 being an epoch of ordinary training on all data."""
    passes = Passes()
    watch = _Watch(passes)
    if isinstance(one.method, AMUN):
        one.method.doublings = 0  # how many there are can depend on how a machine rounds
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    steps = one.content.get("trainer.max_steps", -1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits = {"max_epochs": 2, "max_steps": steps, "limit_val_batches": 0}
        place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "callbacks": [passes, watch]}
        Trainer(**quiet, **limits, **place).fit(_module(one), datamodule=_data(_of_prompts(one)))
    whole = 3 * _COUNT * 4 / 5
    before, *ends = watch.counts
    once = f"{before / whole:.1f}" if watch.prepared else f"{before:,} passes"  # whatever the size of the training set
    per_epoch = "" if isinstance(one.method, OneShot) else f"{(ends[-1] - ends[0]) / whole:.1f}"
    return watch.read, "" if once in ("0.0", "0 passes") else once, per_epoch


def lines_of(kind: type) -> int:
    """How many lines of a file hold code: neither comment nor docstring."""
    text = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    told = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - told)


def published(kind: type) -> str:
    """The first work that the docstring cites."""
    found = _CITED.search(re.sub(r"\s+", " ", inspect.getdoc(kind) or ""))
    return found[0] if found else ""


def told(kind: type) -> str:
    """The docstring without its sections, in Markdown with formulas."""
    text = re.split(r"\n(?:Args|Raises|Example|Returns):\n", inspect.getdoc(kind) or "")[0].strip()
    text = re.sub(r"\.\. math::\n\s*((?: +.*\n?)+)", lambda found: f"$$\n{_left(found[1])}\n$$\n", text)
    text = re.sub(r":math:`([^`]*)`", lambda found: f"${' '.join(found[1].split())}$", text)
    text = re.sub(r":\w+:`~?([\w.]*?)(\w+)`", r"`\2`", text)
    return text.replace("``", "`")


def _left(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _rows(methods: list[Shipped]) -> Iterator[tuple[str, ...]]:
    kinds = {"any": "all", "classifier": "classifiers", "diffusion": "diffusion", "text-to-image": "text-to-image"}
    for one in methods:
        read, once, per_epoch = measured(one)
        sets = [name for name in ("forget", "retain", "val") if name in read]
        yield (
            f"[{one.title}](#{one.kind.__name__.lower()}) `{one.name}`",
            published(one.kind),
            kinds["text-to-image" if _of_prompts(one) else one.method.kind],
            ", ".join(sets),
            "yes" if one.method.needs_original else "",
            once,
            per_epoch,
            str(lines_of(one.kind)),
        )


def page() -> str:
    """The page as it should be."""
    methods = shipped()
    rows = [COLUMNS, ("---",) * len(COLUMNS), *_rows(methods)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    sections = []
    for kind in dict.fromkeys(one.kind for one in sorted(methods, key=lambda one: one.kind.__name__.lower())):
        file = Path(inspect.getfile(kind)).relative_to(Path(__file__).parents[1])
        named = [f"- `method/{one.name}`: {one.comment}" for one in methods if one.kind is kind]
        sections.append("\n".join([f"## {kind.__name__}", "", *named, f"- [{file.name}](../{file})", "", told(kind)]))
    return "\n\n".join([TITLE, INTRO + "\n" + table, *sections]) + "\n"


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit()
