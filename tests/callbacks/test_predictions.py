"""What test and predict write of a classifier."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from salun_lightning.callbacks.predictions import PredictionsWriter
from salun_lightning.data import ForgetClasses
from salun_lightning.evidence.predictions import PredictedSet, Predictions
from tests.modules.small_runs import classifier, digits, trainer


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_image_of_every_set_is_written_once(tmp_path: Path) -> None:
    module, datamodule = classifier(), digits(forget=ForgetClasses(["3"]))
    trainer(tmp_path / "run", callbacks=[PredictionsWriter()]).predict(module, datamodule=datamodule)
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    assert list(rows[0]) == ["set", "index", "target", *(f"p{number}" for number in range(10))]
    train, test, _ = datamodule.load()
    sources = {"test": test, "test_forget": test}
    for name, loader in datamodule.predict_dataloader().items():
        written = [row for row in rows if row["set"] == name]
        positions = torch.tensor([int(row["index"]) for row in written])
        assert torch.equal(positions, torch.cat([batch.indices for batch in loader]))
        source = sources.get(name, train)
        assert [int(row["target"]) for row in written] == source.targets[positions].tolist()
        probabilities = torch.tensor([[float(row[f"p{number}"]) for number in range(10)] for row in written])
        with torch.no_grad():
            expected = module.network.eval()(source.images[positions].float() / 255).softmax(1)
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert len(rows) == 1797
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["predictions.csv", "predictions.safetensors"]


class Other(LightningModule):
    """A module of another project that predicts something else."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch


def test_other_predictions_are_left_alone(tmp_path: Path) -> None:
    loader: DataLoader[Any] = DataLoader(torch.arange(4))
    predictions = trainer(tmp_path, callbacks=[PredictionsWriter()]).predict(Other(), loader)
    assert torch.cat(predictions).tolist() == [0, 1, 2, 3]
    assert not list(tmp_path.iterdir())


def test_what_a_test_has_said_is_not_written_again_as_predicted(tmp_path: Path) -> None:
    """A model that generates is judged in ``test``; ``predict`` makes images alone."""
    module = Other()
    module.predictions = Predictions({"generated": PredictedSet(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1))})  # type: ignore[assignment]
    trainer(tmp_path, callbacks=[PredictionsWriter()]).predict(module, DataLoader(torch.arange(4)))
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, module, datamodule = trainer(tmp_path, callbacks=[PredictionsWriter()]), classifier(), digits(batch_size=50)
    runner.predict(module, datamodule=datamodule)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    predict, done = module.predict_step, []

    def fail(*arguments: Any) -> Any:
        done.append(predict(*arguments))
        if len(done) == 3:
            raise RuntimeError("the power failed")
        return done[-1]

    monkeypatch.setattr(module, "predict_step", fail)
    with pytest.raises(RuntimeError, match="the power failed"):
        runner.predict(module, datamodule=datamodule)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    runner.predict(module, datamodule=datamodule)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_test_writes_what_the_network_says_of_every_sample(tmp_path: Path) -> None:
    module, datamodule = classifier(), digits(forget=ForgetClasses(["3"]), batch_size=50)
    trainer(tmp_path, callbacks=[PredictionsWriter()]).test(module, datamodule=datamodule, verbose=False)
    written = Predictions.load(tmp_path / "predictions.safetensors")
    train, test, _ = datamodule.load()
    assert written.sets.keys() == datamodule.test_dataloader().keys() == {"forget", "retain", "val", "test", "test_forget"}
    assert torch.equal(written.sets["forget"].indices, datamodule.forget_indices)
    for name, part in written.sets.items():
        source = test if name.startswith("test") else train
        with torch.no_grad():
            expected = module.network.eval()(source.images[part.indices].float() / 255)
        torch.testing.assert_close(part.logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(part.targets, source.targets[part.indices])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.safetensors"]


def test_a_second_test_forgets_the_first(tmp_path: Path) -> None:
    module, runner = classifier(), trainer(tmp_path, callbacks=[PredictionsWriter()])
    runner.test(module, datamodule=digits(), verbose=False)
    first = (tmp_path / "predictions.safetensors").read_bytes()
    runner.test(module, datamodule=digits(), verbose=False)
    assert (tmp_path / "predictions.safetensors").read_bytes() == first


def test_a_trial_leaves_what_is_there(tmp_path: Path) -> None:
    """It sees the first batches only."""
    trainer(tmp_path, callbacks=[PredictionsWriter()], fast_dev_run=True).test(classifier(), datamodule=digits(), verbose=False)
    assert not list(tmp_path.iterdir())
