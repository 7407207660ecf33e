"""The configuration of Amnesiac unlearning in the form that relabels: it is RandomLabel, with its labels drawn once."""

from pathlib import Path
from typing import Any

import torch
import yaml

from salun_lightning.configurations import SHIPPED
from salun_lightning.methods import RandomLabel
from salun_lightning.modules import ImageClassifier
from tests.methods.plain_runs import network, settings
from tests.modules.small_runs import trainer
from tests.small import small_datamodule


def test_each_sample_is_met_once_an_epoch_and_has_one_wrong_label_in_all_of_them(tmp_path: Path) -> None:
    method: Any = yaml.safe_load((SHIPPED / "method" / "amnesiac.yaml").read_text())["model.method"]
    assert method["class_path"] == "RandomLabel"
    met: list[dict[int, int]] = [{} for _ in range(3)]

    class Module(ImageClassifier):
        def losses(self, samples: Any) -> torch.Tensor:
            for index, target in zip(samples.indices.tolist(), samples.targets.tolist(), strict=True):
                assert index not in met[self.current_epoch]
                met[self.current_epoch][index] = target
            return super().losses(samples)

    data = small_datamodule()
    module = Module(network(), method=RandomLabel(**method["init_args"]), optimizer=settings)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=data)
    assert met[0] == met[1] == met[2]
    assert sorted(met[0]) == list(range(60))
    assert {index for index, target in met[0].items() if target != index % 3} == set(data.forget_indices.tolist())
    assert len({(target - index) % 3 for index, target in met[0].items()}) == 3  # the true one, and both of the others
