"""The one writer of files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from salun_lightning.files import read_json, set_aside, tensors_fault, whole, write_json, write_text


def test_nothing_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_text(path, "old")
    with whole(path) as unfinished:
        unfinished.write_text("half of the ne")
        assert unfinished.parent == path.parent
        assert path.read_text() == "old"
        unfinished.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with whole(path) as unfinished:
            unfinished.write_text("half of the ne")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_written_reaches_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = __import__("os").fsync, __import__("os").replace
    monkeypatch.setattr("salun_lightning.files.os.fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr("salun_lightning.files.os.replace", lambda *paths: (order.append("replace"), replace(*paths))[1])
    write_text(tmp_path / "file", "text")
    assert order == ["fsync", "replace", "fsync"]


def test_json_is_json(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"loss": float("nan"), "gaps": [1.5, float("inf")], "row": ("SalUn", None)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"loss": None, "gaps": [1.5, None], "row": ["SalUn", None]}


@pytest.mark.parametrize("content", [b"", b'{"key": "a', b"[1, 2]", b"\xff\xfe\x00"])
def test_a_damaged_file_is_set_aside(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="'.*result.json' was set aside as .* because it is damaged"):
        assert read_json(path) == {}
    assert not path.exists()
    (aside,) = tmp_path.iterdir()
    assert aside.read_bytes() == content
    assert read_json(path) == {}


def test_a_folder_is_set_aside_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_text(folder / "checkpoints" / "last.ckpt", "weights")
    with pytest.warns(UserWarning, match="because it was made with other settings"):
        aside = set_aside(folder, "it was made with other settings")
    assert (aside / "checkpoints" / "last.ckpt").read_text() == "weights"
    assert not folder.exists()


def test_what_is_wrong_with_a_file_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    assert tensors_fault(path) == "it is gone"
    save_file({"weight": torch.zeros(3)}, path)
    assert tensors_fault(path) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert str(tensors_fault(path)).startswith("it is damaged (")
