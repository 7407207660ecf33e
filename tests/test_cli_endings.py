"""How the program ends: exit status, and what stands on the screen."""

import sys

import pytest

import salun_lightning
from salun_lightning.cli import main, program

PACKAGE = salun_lightning.__path__[0]


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("train.py", "python train.py"),
        ("/usr/local/bin/salun-lightning", "salun-lightning"),
        ("salun-lightning.exe", "salun-lightning"),
        (f"{PACKAGE}/__main__.py", "python -m salun_lightning"),
    ],
)
def test_commands_are_shown_as_the_program_was_called(
    called: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == shown
    main(["--help"])
    assert f"usage: {shown} <command>" in capsys.readouterr().out
