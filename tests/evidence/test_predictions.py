"""The file of predictions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salun_lightning.evidence.predictions import PredictedSet, Predictions


def two_sets() -> Predictions:
    draw = torch.Generator().manual_seed(0)
    sizes = {"forget": 4, "test": 6}
    return Predictions(
        {
            name: PredictedSet(
                torch.randn(size, 3, generator=draw), torch.arange(size) % 3, torch.randperm(size, generator=draw)
            )
            for name, size in sizes.items()
        }
    )


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = two_sets()
    saved.save(tmp_path / "new" / "file")
    loaded = Predictions.load(tmp_path / "new" / "file")
    assert loaded.sets.keys() == saved.sets.keys()
    for name, part in saved.sets.items():
        assert all(torch.equal(getattr(part, field), getattr(loaded.sets[name], field)) for field in FIELDS)
        assert torch.equal(part.indices, torch.arange(len(part)))
    assert load_file(tmp_path / "new" / "file").keys() == {f"{name}/{field}" for name in saved.sets for field in FIELDS}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


FIELDS = ("logits", "targets", "indices")


def test_samples_are_sorted_with_what_belongs_to_them() -> None:
    part = PredictedSet(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), torch.tensor([3, 1, 2, 0]), torch.tensor([9, 4, 9, 0]))
    assert part.indices.tolist() == [0, 4, 9, 9]
    assert part.targets.tolist() == part.logits.flatten().tolist() == [0, 1, 2, 3]


def test_other_types_are_converted() -> None:
    part = PredictedSet(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32), torch.arange(2.0))
    assert (part.logits.dtype, part.targets.dtype, part.indices.dtype) == (torch.float32, torch.int64, torch.int64)


@pytest.mark.parametrize("shapes", [((4,), (4,), (4,)), ((4, 2), (3,), (4,)), ((4, 2), (4,), (4, 1))])
def test_shapes_that_do_not_go_together(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"Predictions need logits \(N, C\), targets \(N,\) and indices \(N,\), got "):
        PredictedSet(*(torch.zeros(shape) for shape in shapes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "harm",
    [
        _cut,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a file of safetensors"),
        lambda path: save_file({"forget/logits": torch.zeros(2, 2)}, path),
        lambda path: save_file({"weight": torch.zeros(2, 2)}, path),
    ],
)
def test_a_damaged_file(tmp_path: Path, harm: Any) -> None:
    path = tmp_path / "predictions.safetensors"
    two_sets().save(path)
    harm(path)
    with pytest.raises(ValueError, match=r"does not hold predictions, or is damaged .* Test the model again") as refused:
        Predictions.load(path)
    assert str(path) in str(refused.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There are no predictions at .* Test the model"):
        Predictions.load(tmp_path / "predictions.safetensors")
