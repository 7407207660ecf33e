"""A network of timm by name, as the page on own data says: ``pytest -m foreign``."""

import re
from pathlib import Path

import pytest
import yaml

from salun_lightning.cli import main

pytestmark = [pytest.mark.foreign, pytest.mark.filterwarnings("default")]

PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"


def test_a_network_of_timm_is_named_by_its_function(tmp_path: Path) -> None:
    (line,) = re.findall(r"`(model\.network: .*timm\.create_model.*)`", PAGE.read_text(encoding="utf-8"))
    content = yaml.safe_load(line)
    content["model.network"]["init_args"]["model_name"] = "resnet10t"
    content["model.network"]["dict_kwargs"]["in_chans"] = 1
    (tmp_path / "network.yaml").write_text(yaml.safe_dump(content))
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]
    quick += ["--trainer.accelerator=cpu", "--model.optimizer.lr=0.05"]  # an override beside a function once failed
    files = ["-c", "digits", "-c", "digits/original", "-c", str(tmp_path / "network.yaml")]
    cli = main(["fit", *files, *quick, f"--trainer.default_root_dir={tmp_path}"])
    assert type(cli.model.network).__module__.startswith("timm.")
    assert cli.model.network.num_classes == 10
    found = main(["test", *files, "--ckpt_path=last", *quick[2:], f"--trainer.default_root_dir={tmp_path}"])
    assert "UA" in found.trainer.callback_metrics
