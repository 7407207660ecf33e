"""Files that appear whole or not at all: the one writer, and a reader that does not trust what it finds."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MACHINE = socket.gethostname()


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to. When the block ends well, what was written there takes the place of ``path``.

    It lies in the same folder, so the change of name is one step on every file system. What was written reaches the disk
    before that, so a machine that loses its power leaves either the old file or the new one. What a process that was killed
    has left of the same file is removed.

    Args:
        path: The file that is to appear. Its folder is made.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with whole(folder / "table.md") as unfinished:
        ...     _ = unfinished.write_text("done")
        >>> (folder / "table.md").read_text()
        'done'
    """
    path = Path(path)
    unfinished = _prepared(path)
    try:
        yield unfinished
        _to_disk(unfinished)
        os.replace(unfinished, path)
        _to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: an empty one to write to, which takes the place of ``path``. What was there is removed.

    Args:
        path: The folder that is to appear. If something else than an older version of it may lie there, look before.
    """
    path = Path(path)
    unfinished = _prepared(path)
    unfinished.mkdir()
    try:
        yield unfinished
        for written in unfinished.rglob("*"):
            _to_disk(written)
        replace_folder(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def replace_folder(finished: Path, path: Path) -> None:
    """Put a folder in the place of another one beside it, which is removed. If that fails, the other one stays.

    Args:
        finished: The folder, by the name that it has so far.
        path: The name that it is to have.
    """
    old = _beside(path, "old")
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(finished, path)
        _to_disk(path.parent)
    finally:
        _remove_old(old, path)


def _prepared(path: Path) -> Path:
    """Where to write what is to appear at a path: in its folder, which is there and holds nothing of dead processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = re.compile(rf"{re.escape(f'{path.name}.{_MACHINE}-')}(\d+)\.(part|old)")
    leftovers = [(file, match) for file in path.parent.iterdir() if (match := name.fullmatch(file.name))]
    for leftover, match in leftovers:
        if _is_alive(int(match[1])):
            continue
        if match[2] == "old":
            _remove_old(leftover, path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return _beside(path, "part")


def _beside(path: Path, word: str) -> Path:
    """With the machine, because the number of a process says nothing on another one that shares the folder."""
    return path.with_name(f"{path.name}.{_MACHINE}-{os.getpid()}.{word}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def _remove_old(old: Path, path: Path) -> None:
    """Remove a folder that another one has replaced; if nothing has taken its place, put it back."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that appears whole or not at all."""
    write_text(path, as_json(content))


def as_json(content: Any) -> str:
    """The text of a JSON file. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(content: Any) -> str:
    """A short name for what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there, or is damaged: then it is set aside."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        set_aside(path, "it is damaged")
        return {}
    return content


def read_torch(
    path: str | os.PathLike[str],
    what: str = "a checkpoint",
    stream: IO[bytes] | None = None,
    map_location: Any = "cpu",
    mmap: bool = False,
) -> Any:
    """What a file of torch holds: tensors and plain data. Nothing in it is executed.

    Args:
        path: The file.
        what: What it should be, for the message.
        stream: The content, where it is not read from ``path``.
        map_location: The device of the tensors.
        mmap: Leave the tensors on the disk until they are looked at.

    Raises:
        ValueError: The file is damaged, or would need code to be executed.
    """
    import torch

    try:
        if mmap:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
        # not by its path: torch takes one that ends in .safetensors for what its name says
        with _opened(path, stream) as file:
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        advice = "weights_only" in str(error)  # to execute the code, so neither the text nor its traceback is passed on
        if advice and is_of_torch(path, stream):
            raise ValueError(
                f"'{path}' cannot be read as {what} without executing code in it: it holds more than tensors and plain data, of"
                " which nothing was executed. Save the weights alone where it was made: torch.save(model.state_dict(), path)."
            ) from None
        raise ValueError(
            f"'{path}' cannot be read as {what}; it may be truncated, or a file of another kind. Give another one, or make it"
            " again."
        ) from (None if advice else error)


def is_of_torch(path: str | os.PathLike[str], stream: IO[bytes] | None = None) -> bool:
    """Whether a file starts like those that ``torch.save`` writes, whatever its name says."""
    with _opened(path, stream) as file:
        start = file.read(2)
    return start[:1] == b"\x80" or start == b"PK"


@contextmanager
def _opened(path: str | os.PathLike[str], stream: IO[bytes] | None) -> Iterator[IO[bytes]]:
    if stream is None:
        with open(path, "rb") as file:
            yield file
    else:
        stream.seek(0)
        yield stream


def tensors_fault(path: Path) -> str | None:
    """Why a file of safetensors cannot be used, as the end of a sentence; None if it can. Only its header is read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return "it is gone"
    try:
        with safe_open(path, framework="numpy"):
            return None
    except SafetensorError as error:
        return f"it is damaged ({error})"


def set_aside(path: Path, why: str) -> Path:
    """Rename a file or folder that must not be used, so that nothing is lost, and say so.

    Args:
        path: The file or folder.
        why: The reason, as the end of a sentence.

    Returns:
        Where it lies now.
    """
    aside = path.with_name(f"{path.name}.aside-{time.time_ns()}")
    os.replace(path, aside)
    warnings.warn(f"'{path}' was set aside as '{aside.name}', because {why}.", stacklevel=2)
    return aside
