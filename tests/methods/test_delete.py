"""DELETE against a plain loop."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from salun_lightning.data import Samples
from salun_lightning.methods import DELETE
from salun_lightning.modules import ImageClassifier
from tests.methods.plain_runs import check_same, divergence, frozen_run_moves_nothing, half_a_mask, network, run, run_by_hand
from tests.modules.small_runs import trainer
from tests.small import small_datamodule


def by_hand(student: nn.Module, original: nn.Module, batch: Mapping[str, Samples], epoch: int) -> Tensor:
    """The probabilities of the other classes, as the original model has them, of one in all."""
    (samples,) = batch.values()
    with torch.no_grad():
        teacher = original(samples.inputs).softmax(1)
    for row, target in enumerate(samples.targets.tolist()):
        teacher[row, target] = 0
        teacher[row] /= teacher[row].sum()
    return divergence(teacher, student(samples.inputs)).mean()


@pytest.mark.parametrize("masked", [False, True])
def test_delete_is_that_of_the_plain_loop(tmp_path: Path, masked: bool) -> None:
    mask = half_a_mask() if masked else None
    module, batches = run(tmp_path, DELETE(), mask, max_epochs=3)
    assert [list(batch) for batch, _ in batches.seen] == [["forget"]] * 6
    check_same(module, run_by_hand(by_hand, batches, mask), mask)


def test_batch_norm_as_in_the_original_model(tmp_path: Path) -> None:
    def in_eval(student: nn.Module, *others: Mapping[str, Samples]) -> Tensor:
        student.eval()
        return by_hand(student, *others)  # type: ignore[arg-type]

    module, batches = run(tmp_path, DELETE(eval_batch_norm=True), max_epochs=3)
    check_same(module, run_by_hand(in_eval, batches))
    assert torch.equal(module.network[1].running_mean, network()[1].running_mean)
    assert module.network[1].training  # as before the run
    plain, _ = run(tmp_path, DELETE(), max_epochs=3)
    assert not torch.equal(plain.network[1].running_mean, network()[1].running_mean)


def test_it_forgets_and_keeps_the_order_of_the_other_classes() -> None:
    """At its minimum the student is the original model without the true class."""
    torch.manual_seed(0)
    original, targets = torch.randn(20, 5), torch.arange(20) % 5
    samples = Samples(original, targets, torch.arange(20))

    class Table:
        """A network that has a row of logits for each sample."""

        logits_of_student = original.clone().requires_grad_()

        def logits(self, inputs: Tensor, original: bool = False) -> Tensor:
            return inputs if original else self.logits_of_student

    table = Table()
    optimizer = torch.optim.SGD([table.logits_of_student], lr=40.0)
    for _ in range(500):
        optimizer.zero_grad()
        DELETE().loss(table, {"forget": samples}).backward()  # type: ignore[arg-type]
        optimizer.step()
    probabilities = table.logits_of_student.softmax(1)
    assert probabilities[torch.arange(20), targets].max() < 0.01
    others = torch.ones(20, 5, dtype=torch.bool).scatter(1, targets[:, None], False)
    assert torch.equal(probabilities[others].view(20, 4).argsort(), original[others].view(20, 4).argsort())


def test_one_class_leaves_nothing(tmp_path: Path) -> None:
    table = type("Table", (), {"logits": lambda self, inputs, original=False: inputs})()
    with pytest.raises(ValueError, match=r"^DELETE leaves out the true class, so it needs at least two classes"):
        DELETE().loss(table, {"forget": Samples(torch.zeros(2, 1), torch.zeros(2).long(), torch.arange(2))})


def test_the_retain_set_alone_is_refused(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=DELETE())
    with pytest.raises(ValueError, match=r"^DELETE needs the part 'forget' in each batch"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_datamodule(order="retain"))


def test_a_mask_of_nothing(tmp_path: Path) -> None:
    frozen_run_moves_nothing(tmp_path, DELETE())
