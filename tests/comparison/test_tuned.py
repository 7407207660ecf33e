"""The heading of what was searched or piloted: whoever reads it back refuses the seeds it names."""

from pathlib import Path

import pytest

from salun_lightning.comparison.tuned import check_seed, heading
from salun_lightning.configurations import SHIPPED

PILOTED = sorted((SHIPPED / "digits_text" / "tuned").glob("*.yaml"))


@pytest.mark.parametrize("seeds", [[100], [100, 101, 7]])
@pytest.mark.parametrize("default", [None, 5.0])
def test_the_seeds_of_a_heading_are_refused_and_no_others(tmp_path: Path, seeds: list[int], default: float | None) -> None:
    (tmp_path / "ssd.yaml").write_text("\n".join([*heading(20, seeds, 4.231, default, "search --seeds 5"), "model.lr: 11"]))
    for seed in seeds:
        with pytest.raises(ValueError, match=rf"^Seed {seed} is one of those that the values of '.*ssd\.yaml' were searched"):
            check_seed(seed, [tmp_path / "ssd.yaml"])
    for seed in (1, 5, 10, 11, 20, 1001):
        check_seed(seed, [tmp_path / "ssd.yaml"])


@pytest.mark.parametrize("path", PILOTED, ids=lambda path: path.stem)
def test_the_seeds_of_the_text_pilot_are_refused(path: Path) -> None:
    for seed in (100, 101):
        with pytest.raises(ValueError, match=rf"^Seed {seed} is one of those"):
            check_seed(seed, [path])
    check_seed(1, [path])


def test_every_method_that_was_piloted_has_values() -> None:
    assert {path.stem for path in PILOTED} == {"finetune", "esd", "forget_me_not", "concept_ablation", "salun_concept"}
