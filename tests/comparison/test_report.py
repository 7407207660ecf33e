"""The figures of the table, against figures worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from salun_lightning.comparison.report import average_gap, markdown, plot, summarise


def cell(row: str, seed: int, figures: tuple[float, float, float, float], seconds: float) -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "metrics": dict(zip(("UA", "RA", "TA", "MIA"), figures, strict=True)),
        "seconds": seconds,
        "command": f"python train.py fit {row} {seed}",
        "forget_confidence": [0.2, 1.0, 0.9],
    }


@pytest.fixture
def results() -> dict[tuple[str, int], dict[str, Any]]:
    cells = [
        cell("Retrain", 1, (5, 100, 94, 12), 10),
        cell("Retrain", 2, (7, 100, 92, 14), 20),
        cell("Retrain again", 1, (6, 100, 94, 13), 10),
        cell("SalUn", 1, (3, 99, 93, 14), 2),
        cell("SalUn", 2, (11, 98, 93, 13), 2),
        cell("SalUn", 3, (50, 50, 50, 50), 2),  # no retrained model of this seed
    ]
    return {(c["row"], c["seed"]): c for c in cells}


def test_gaps_are_paired_by_seed(results: Any) -> None:
    summary = summarise(results, "Retrain")
    # seed 1: (2 + 1 + 1 + 2) / 4 = 1.5; seed 2: (4 + 2 + 1 + 1) / 4 = 2; their sample deviation is 0.5 / sqrt(2)
    assert summary["SalUn"]["gap"] == {"mean": 1.75, "std": pytest.approx(0.5 / 2**0.5), "seeds": 2}
    assert summary["SalUn"]["cost"]["mean"] == pytest.approx((0.2 + 0.1) / 2)
    assert summary["SalUn"]["UA"]["seeds"] == 3
    assert summary["Retrain"]["gap"]["mean"] == 0
    assert summary["Retrain again"]["gap"] == {"mean": 0.5, "std": 0.0, "seeds": 1}
    assert average_gap(results["SalUn", 1]["metrics"], results["Retrain", 1]["metrics"]) == 1.5


def test_gap_of_means_is_not_mean_of_gaps() -> None:
    results = {
        ("Retrain", 1): cell("Retrain", 1, (0, 0, 0, 0), 1),
        ("Retrain", 2): cell("Retrain", 2, (0, 0, 0, 0), 1),
        ("SalUn", 1): cell("SalUn", 1, (4, 4, 4, 4), 1),
        ("SalUn", 2): cell("SalUn", 2, (-4, -4, -4, -4), 1),
    }
    assert summarise(results, "Retrain")["SalUn"]["gap"]["mean"] == 4


def test_table(results: Any) -> None:
    table = markdown(summarise(results, "Retrain"), results, "Retrain", "Retrain again").splitlines()
    assert table[2].startswith("| Retrain | 6.00 ± 1.41 | 100.00 ± 0.00 |")
    assert "| 0 | 1.000 ± 0.000 |" in table[2]
    assert table[3].startswith("| Retrain again (noise floor) | 6.00 ± 0.00 |")
    assert "| 1.75 ± 0.35 | 0.150 ± 0.071 |" in table[4]
    assert "- SalUn: `python train.py fit SalUn 1`" in table


def test_a_row_without_a_reference_has_no_gap(results: Any) -> None:
    alone = {key: result for key, result in results.items() if key[0] == "SalUn"}
    assert markdown(summarise(alone, "Retrain"), alone, "Retrain", None).splitlines()[2].endswith("| - | - |")


def test_plots_show_every_row(results: Any, tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    results["SalUn", 1]["mask_density"] = {"stem": 0.25, "head": 0.75}
    drawn: dict[str, list[str]] = {}
    close, plt.close = plt.close, lambda: drawn.update({str(len(drawn)): _texts(plt.gcf())}) or close()
    try:
        paths = plot(summarise(results, "Retrain"), results, "Retrain", "Retrain again", tmp_path)
    finally:
        plt.close = close
    assert [path.name for path in paths] == ["comparison.png", "confidence.png", "mask.png"]
    assert all(path.stat().st_size > 5_000 for path in paths)
    assert {"SalUn", "UA  [%]", "MIA  [%]", "noise floor"} <= set(drawn["0"])
    assert {"SalUn", "Retrain"} <= set(drawn["1"])
    assert {"stem", "head"} <= set(drawn["2"])


def _texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]
