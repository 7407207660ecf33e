"""Files that appear whole or not at all: the one writer, and a reader that does not trust what it finds."""

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to. When the block ends well, what was written there takes the place of ``path``.

    It lies in the same folder, so the change of name is one step on every file system. What was written reaches the disk
    before that, so a machine that loses its power leaves either the old file or the new one.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        _to_disk(unfinished)
        os.replace(unfinished, path)
        _to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


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
