"""The one writer of files."""

import io
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from salun_lightning.files import (
    read_json,
    read_torch,
    set_aside,
    tensors_fault,
    whole,
    whole_folder,
    write_json,
    write_text,
)


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


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_unfinished_is_removed_when_the_file_is_written_again(tmp_path: Path) -> None:
    path, dead = tmp_path / "last[1].ckpt", dead_process()
    machine = socket.gethostname()
    leftover = tmp_path / f"{path.name}.{machine}-{dead}.part"
    folder = tmp_path / f"{path.name}.{machine}-{dead}.old"
    others = [
        tmp_path / name
        for name in (
            f"{path.name}.{machine}-{os.getppid()}.part",  # it is alive
            f"{path.name}.another-{dead}.part",  # whether it is alive, only its machine knows
            f"other.ckpt.{machine}-{dead}.part",
            f"{path.name}.{machine}-.part",
            f"{path.name}.part",
        )
    ]
    for file in (leftover, *others):
        file.write_text("half")
    folder.mkdir()
    path.write_text("old")
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path, *others}


def test_a_folder_appears_whole_in_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pipeline"
    for content in ("old", "new"):
        with whole_folder(folder) as unfinished:
            assert not any(unfinished.iterdir())
            write_text(unfinished / "unet" / content, content)
            assert not (folder / "unet" / content).exists()
        assert [path.name for path in folder.rglob("*")] == ["unet", content]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("when", ["while it is written", "while it is swapped"])
def test_a_failure_leaves_the_old_folder_alone(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pipeline"
    write_text(folder / "weights", "old")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target == folder and source.name.endswith(".part"):
            raise OSError("no space left")
        replace(source, target)

    def write() -> None:
        with whole_folder(folder) as unfinished:
            write_text(unfinished / "weights", "new")
            if when == "while it is written":
                raise OSError("no space left")
            monkeypatch.setattr("salun_lightning.files.os.replace", fail)

    with pytest.raises(OSError, match="no space left"):
        write()
    assert (folder / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_a_killed_process_had_moved_out_of_the_way_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames of a swap leaves nothing under the name."""
    folder, machine, dead = tmp_path / "pipeline", socket.gethostname(), dead_process()
    write_text(tmp_path / f"pipeline.{machine}-{dead}.old" / "weights", "old")
    write_text(tmp_path / f"pipeline.{machine}-{dead}.part" / "weights", "new")
    with pytest.raises(OSError, match="no space left"), whole_folder(folder):
        raise OSError("no space left")
    assert (folder / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_no_code_in_a_file_of_torch_is_executed(zipped: bool, streamed: bool, tmp_path: Path) -> None:
    path, harm = tmp_path / "evil.pt", tmp_path / "harm"
    torch.save({"weight": Touch(harm)}, path, _use_new_zipfile_serialization=zipped)
    stream = io.BytesIO(path.read_bytes()) if streamed else None
    message = (
        r"'.*evil.pt' cannot be read as a mask without executing code in it: it holds more .* nothing was executed. Save the"
    )
    with pytest.raises(ValueError, match=message) as caught:
        read_torch(path, "a mask", stream)
    assert caught.value.__suppress_context__  # torch's advice is to execute the code
    assert caught.value.__cause__ is None
    assert not harm.exists()


@pytest.mark.parametrize("content", [b"", b"weights: none\n", b"PK\x03\x04 cut off"])
def test_a_damaged_file_of_torch_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"'.*junk.pt' cannot be read as a checkpoint; it may be truncated, or a file of"
    ) as caught:
        read_torch(tmp_path / "junk.pt")
    assert caught.value.__suppress_context__
    assert "weights_only" not in f"{caught.value} {caught.value.__cause__}"


def test_tensors_may_stay_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"weight": torch.arange(1000.0)}, path)
    assert torch.equal(read_torch(path, mmap=True)["weight"], torch.arange(1000.0))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint; it may be truncated"):
        read_torch(path, mmap=True)


def test_what_is_wrong_with_a_file_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    assert tensors_fault(path) == "it is gone"
    save_file({"weight": torch.zeros(3)}, path)
    assert tensors_fault(path) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert str(tensors_fault(path)).startswith("it is damaged (")
