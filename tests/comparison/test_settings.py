"""The key of a cell: it changes with what its files hold, and with nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from salun_lightning.comparison import settings
from salun_lightning.comparison.plan import Plan
from salun_lightning.comparison.rows import ConfigFile, Row

CONFIGS = Path(__file__).parents[2] / "configs"
POSITIONS = "data.init_args.forget.init_args.positions"


def keys(folder: Path, out: Path = Path("out"), **options: Any) -> dict[str, str]:
    """The keys of an original model, a retrained one, and one that starts from the original, by row."""
    plan = Plan(out, options, task=[ConfigFile(str(folder / "digits.yaml"))])
    files = {"original": "digits/original.yaml", "Retrain": "digits/retrain.yaml", "SalUn": "method/salun.yaml"}
    plan.add({row: Row(ConfigFile(str(folder / file))) for row, file in files.items()}, [1], {})
    return {cell.row: cell.key for cell in plan.cells}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {row for row in before if before[row] != after[row]}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The configurations of the digits, with a list of what is to be forgotten that the task names."""
    folder = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
    task = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
    positions = tmp_path / "positions.txt"
    positions.write_text("1\n2\n")
    task["data"]["init_args"]["forget"] = {"class_path": "ForgetIndices", "init_args": {"positions": str(positions)}}
    (folder / "digits.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_another_list_of_images_to_forget_is_another_comparison(configs: Path, tmp_path: Path) -> None:
    """The request of a user was changed; yesterday's models did not forget it."""
    before = keys(configs)
    positions = tmp_path / "positions.txt"
    times = positions.stat()
    positions.write_text("1\n3\n")
    os.utime(positions, ns=(times.st_atime_ns, times.st_mtime_ns))  # by its content, not by its time
    assert changed(before, keys(configs)) == {"original", "Retrain", "SalUn"}
    positions.write_text("1\n2\n")
    assert keys(configs) == before


def test_comments_and_places_change_nothing(configs: Path, tmp_path: Path) -> None:
    before = keys(configs)
    for file in configs.rglob("*.yaml"):
        file.write_text("# a remark\n" + file.read_text() + "\n\n")
    assert keys(configs, tmp_path / "elsewhere") == before
    shutil.copytree(configs, tmp_path / "moved")
    shutil.move(tmp_path / "positions.txt", tmp_path / "list.txt")
    data = tmp_path / "moved" / "digits.yaml"
    data.write_text(data.read_text().replace("positions.txt", "list.txt"))
    assert keys(tmp_path / "moved") == before


def test_a_default_written_out_changes_nothing_and_a_setting_does(configs: Path) -> None:
    before = keys(configs)
    assert keys(configs, **{"data.split_seed": 0}) == before
    assert changed(before, keys(configs, **{"data.split_seed": 1})) == {"original", "Retrain", "SalUn"}
    salun = configs / "method" / "salun.yaml"
    salun.write_text(salun.read_text().replace("ratio: 0.5", "ratio: 0.4"))
    assert changed(before, keys(configs)) == {"SalUn"}


def rewritten(path: Path) -> None:
    path.write_bytes(b"1" * len(path.read_bytes()))


def image_added(path: Path) -> None:
    (path / "train" / "cat" / "2.png").write_bytes(b"an image")


def image_changed(path: Path) -> None:
    (path / "train" / "cat" / "1.png").write_bytes(b"larger than before")


def image_renamed(path: Path) -> None:
    (path / "train" / "cat" / "1.png").rename(path / "train" / "cat" / "0.png")


@pytest.mark.parametrize(
    ("option", "size", "change"),
    [
        ("saliency.mask", 100, rewritten),
        ("saliency.mask", 2 << 20, rewritten),
        ("model.original", 2 << 20, rewritten),
        ("data.root", 0, image_added),
        ("data.root", 0, image_changed),
        ("data.root", 0, image_renamed),
    ],
)
def test_whatever_file_a_setting_names_counts(tmp_path: Path, option: str, size: int, change: Callable[[Path], None]) -> None:
    named = tmp_path / "named"
    options: dict[str, Any] = {"fit": str(named)}
    if size:
        named.write_bytes(b"0" * size)
    else:
        (named / "train" / "cat").mkdir(parents=True)
        (named / "train" / "cat" / "1.png").write_bytes(b"an image")
        options = {"data": "ImageFolderDataModule", "data.forget": "ForgetRandom", "data.forget.fraction": 0.1}
    options = {name: value for name, value in options.items() if name != "fit"} | {option: str(named)}

    def key() -> str:
        plan = Plan(tmp_path / "out", options)
        plan.add({"original": Row([ConfigFile("digits"), ConfigFile("digits/original")])}, [1], {})
        return plan.cells[0].key

    before = key()
    assert key() == before
    change(named)
    assert key() != before


@pytest.mark.parametrize(
    ("setting", "counts"),
    [("data.root", False), ("data.other", True), ("trainer.logger.save_dir", False), ("trainer.callbacks.0.mask", True)],
)
def test_folders_that_runs_fill_do_not_count(tmp_path: Path, setting: str, counts: bool) -> None:
    """Else the second start would find other folders than the first, and run everything again."""
    named = tmp_path / "named"
    named.mkdir()
    if setting.endswith("mask"):
        named = named / "file"

    def key() -> str:
        return settings.SettingsReader(tmp_path / "out").key({"data.download": True, setting: str(named)}, [])

    before = key()
    (tmp_path / "named" / "file").write_text("written by a run")
    assert (key() != before) == counts


def test_the_folder_of_the_comparison_does_not_count_as_a_part_of_others(tmp_path: Path) -> None:
    (tmp_path / "data" / "out").mkdir(parents=True)
    named = {"data.root": str(tmp_path / "data")}
    before = settings.SettingsReader(tmp_path / "data" / "out").key(named, [])
    (tmp_path / "data" / "out" / "result.json").write_text("{}")
    assert settings.SettingsReader(tmp_path / "data" / "out").key(named, []) == before
    assert settings.SettingsReader(tmp_path / "out").key(named, []) != before


def test_a_second_start_does_not_parse(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser needs Lightning, whose import takes seconds."""
    plan = Plan(tmp_path / "out", {})
    rows = {"Retrain": Row([ConfigFile(str(configs / name)) for name in ("digits.yaml", "digits/retrain.yaml")])}
    plan.add(rows, [1], {})
    plan.reader.save()
    monkeypatch.setattr(settings, "_read", {})
    monkeypatch.setattr(settings, "_parsed", lambda *_: pytest.fail("it is parsed again"))
    again = Plan(tmp_path / "out", {})
    again.add(rows, [1], {})
    assert again.cells[0].key == plan.cells[0].key


def test_only_another_release_of_this_package_counts(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salun_lightning.__version__", "1.2.3")
    before = keys(configs)
    monkeypatch.setattr("salun_lightning.__version__", "1.2.4")
    assert keys(configs) == before
    monkeypatch.setattr("salun_lightning.__version__", "1.3.0")
    assert changed(before, keys(configs)) == {"original", "Retrain", "SalUn"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data.split_sed": 1}, "split_sed"),
        ({"seed_everything": "{other_seed}"}, "{other_seed}"),
        ({"model.method": "RandomLabl"}, "RandomLabl"),
    ],
)
def test_options_that_fit_does_not_know_are_refused_with_the_row(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="(?s)Row 'original': .*" + sentence):
        keys(CONFIGS, **options)
