"""The page of methods is what their classes say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from salun_lightning.configurations import SHIPPED

SCRIPT = Path(__file__).parents[1] / "docs" / "make_methods.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_methods", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_it_is_as_the_script_makes_it(maker: ModuleType) -> None:
    written = maker.PAGE.read_text(encoding="utf-8")
    assert written == maker.page(), "run: python docs/make_methods.py"


def test_it_has_every_method(maker: ModuleType) -> None:
    written = maker.PAGE.read_text(encoding="utf-8")
    for path in (SHIPPED / "method").glob("*.yaml"):
        assert f"\n- `method/{path.stem}`: " in written


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("GA (a baseline of Fan et al., ICLR 2024).", "Fan et al., ICLR 2024"),
        ("RL (Fan et al., ICLR 2024, alpha = 1).", "Fan et al., ICLR 2024"),
        ("As (Heng and\n    Soh, NeurIPS 2023).", "Heng and Soh, NeurIPS 2023"),
        ("TS (Chen et al., arXiv 2605.08730, 2026).", "Chen et al., arXiv 2605.08730"),
        ("Nobody wrote of it in 2024.", ""),
    ],
)
def test_what_is_cited(maker: ModuleType, docstring: str, expected: str) -> None:
    assert maker.published(type("Some", (), {"__doc__": docstring})) == expected


def test_docstrings_in_markdown(maker: ModuleType) -> None:
    text = "Of :math:`x\n    y` and ``b``.\n\n    .. math::\n        a\n        + b\n\n    End.\n\n    Args:\n        x: y\n"
    said = type("Some", (), {"__doc__": text})
    assert maker.told(said) == "Of $x y$ and `b`.\n\n$$\na\n+ b\n$$\n\nEnd."
