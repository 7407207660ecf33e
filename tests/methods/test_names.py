"""A method is found by its name: one in a new file of the package, and one that another package offers."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import salun_lightning
from salun_lightning.cli import main
from salun_lightning.methods import Method
from salun_lightning.networks import SmallResNet

ROOT = Path(salun_lightning.__file__).parents[1]

METHOD = '''"""{name}: twice the loss of the retain set."""

from salun_lightning.methods import Method, part


class {name}(Method):
    """Twice the loss."""

    order = "retain"

    def loss(self, module, batch):
        print("{name} was asked")
        return 2 * module.task_loss(part(batch, "retain", self))
'''

LOOK = """
import sys
import salun_lightning
assert not {"torch", "lightning"} & sys.modules.keys()
from salun_lightning import Whisper
import salun_lightning.methods
assert salun_lightning.methods.Whisper is Whisper and "Whisper" in salun_lightning.__all__
assert "salun_lightning.modules.diffusion" not in sys.modules  # which takes seconds
print(Whisper.order)
"""


def test_a_new_file_in_the_folder_of_methods_is_all_that_a_method_needs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "salun_lightning", tmp_path / "salun_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "salun_lightning/methods/whisper.py").write_text(METHOD.format(name="Whisper"))
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "retain"


def test_the_names_at_the_top_are_those_of_the_packages() -> None:
    names = set(salun_lightning.__all__)
    assert {"ClassDiffusion", "ImageClassifier", "RandomLabel", "SSD", "SaliencyMasking", "SmallResNet", "Samples"} <= names
    for name in names:
        assert getattr(salun_lightning, name) is not None
    with pytest.raises(AttributeError, match="module 'salun_lightning' has no attribute 'RandomLable'"):
        salun_lightning.RandomLable  # noqa: B018


def offer(folder: Path, name: str, value: str) -> None:
    """A package as pip leaves it."""
    (folder / "shouting.py").write_text(METHOD.format(name="Shout"))
    info = folder / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[salun_lightning.methods]\n{name} = {value}\n")


def fit(folder: Path, method: str) -> None:
    main(
        [
            "fit",
            f"--trainer.default_root_dir={folder / 'run'}",
            "--trainer.fast_dev_run=true",
            "--data=DigitsDataModule",
            "--data.forget=ForgetRandom",
            "--data.forget.count=20",
            "--model=ImageClassifier",
            "--model.network=SmallResNet",
            "--model.network.num_classes=10",
            "--model.network.width=4",
            f"--model.original={folder / 'original.pt'}",
            f"--model.method={method}",
        ]
    )


def test_a_method_that_another_package_offers_is_named_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(tmp_path, "Shout", "shouting:Shout")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(SmallResNet(10, width=4).state_dict(), tmp_path / "original.pt")
    fit(tmp_path, "Shout")
    assert "Shout was asked" in capsys.readouterr().out
    assert issubclass(importlib.import_module("shouting").Shout, Method)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("Absent", "not_installed:Absent", "The method Absent of another package cannot be imported: No module named"),
        ("Loud", "shouting:Shout", "The entry point Loud of salun_lightning.methods is 'shouting:Shout', which is no method"),
        ("part", "salun_lightning.methods:part", "which is no method of that name"),
    ],
)
def test_an_offer_that_is_none_is_said_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    offer(tmp_path, name, value)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=said):
        salun_lightning.methods.load_offered()


def test_any_package_can_be_imported_first() -> None:
    """Others ask this one for names while it is being imported: jsonargparse does. Each in a fork, to pay once for torch."""
    look = """
import importlib, os, sys, torch, lightning.pytorch
for package in ("callbacks", "data", "methods", "metrics", "modules", "networks", "saliency"):
    child = os.fork()
    if not child:
        importlib.import_module(f"salun_lightning.{package}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, package
"""
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_look_for_a_name_imports_nothing() -> None:
    look = "import sys, salun_lightning; hasattr(salun_lightning, 'Nothing'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
