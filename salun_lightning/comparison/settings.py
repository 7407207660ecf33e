"""What a ``fit`` command comes to: its settings, file by file and default by default, and what the files hold."""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import salun_lightning
from salun_lightning.configurations import located
from salun_lightning.files import read_json, write_json
from salun_lightning.sentences import sentence

Settings = dict[str, Any]
"""Plain values by dotted name; paths are text."""

EMPTY = "empty"
"""What stands for a list or a group without elements."""

_SMALL = 1 << 20
_read: dict[str, dict[str, Any]] = {}  # what this process has read, in any comparison


class SettingsReader:
    """Reads commands with the command line's own parser, and tells what determines their outcome.

    The parser needs Lightning, whose import takes seconds. So what it made of a command is kept in the folder of the
    comparison, with the digests of the configuration files it read: while these are the same, it need not be asked again.

    Args:
        out: The folder of the comparison.
    """

    def __init__(self, out: Path) -> None:
        self._memory = out / "settings.json"
        self._known: dict[str, Any] = read_json(self._memory)
        self._used: dict[str, Any] = {}
        self._written = out.resolve()
        self._stamps: dict[str, Any] = {}

    def read(self, arguments: Sequence[str]) -> Settings:
        """The settings that these arguments of ``fit`` come to, all but the run folder.

        Raises:
            ValueError: They are not accepted.
        """
        name = _digest([salun_lightning.__version__, os.getcwd(), list(arguments)])
        entry = self._known.get(name) or _read.get(name)
        if entry is None or entry["files"] != {path: self._stamp(path) for path in entry["files"]}:
            settings, files = _parsed(arguments)
            entry = {"files": {path: self._stamp(path) for path in files}, "settings": settings}
        self._used[name] = _read[name] = entry
        return dict(entry["settings"])

    def save(self) -> None:
        """Keep what was read for the next start."""
        if self._used != self._known:
            write_json(self._memory, self._used)

    def key(self, settings: Settings, needed: Sequence[str]) -> str:
        """Digest of all that determines what a run comes to.

        That is the version of this package without its last number, the settings, the keys of the runs whose models this one
        starts from, and every file and folder that a setting names: what it holds in place of its name, so that neither a
        comment in a configuration nor a folder that moved changes the key. A file of at most 1 MiB, such as a list of images to
        forget, counts by its content; a larger one, such as a checkpoint or a mask, by size and time; a folder by the names,
        sizes and times of its files. Not looked into are folders under ``trainer``, where loggers and checkpoints are written,
        and a ``root`` beside ``download: true``, which torchvision fills and checks.

        Args:
            settings: From :meth:`read`.
            needed: The keys of the runs whose models this one starts from.
        """
        content = {name: self._content(name, value, settings) for name, value in sorted(settings.items())}
        return _digest([salun_lightning.__version__.rpartition(".")[0], content, list(needed)])

    def _content(self, name: str, value: Any, settings: Settings) -> Any:
        owner, _, option = name.rpartition(".")
        filled = name.startswith("trainer.") or (option == "root" and settings.get(f"{owner}.download") is True)
        if not isinstance(value, str) or not value or (filled and os.path.isdir(value)):
            return value
        return self._stamp(value)

    def _stamp(self, path: str) -> Any:
        """What tells whether a file or folder is still the same; a text that names none is its own stamp."""
        if path not in self._stamps:
            stamp: Any = path
            if os.path.isdir(path):
                stamp = {"files": _digest(sorted(self._files(path)))}
            elif os.path.isfile(path):
                found = os.stat(path)
                if found.st_size > _SMALL:
                    stamp = {"size": found.st_size, "time": found.st_mtime_ns}
                else:
                    stamp = {"content": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            self._stamps[path] = stamp
        return self._stamps[path]

    def _files(self, folder: str) -> Iterator[tuple[str, int, int]]:
        seen = {self._written}  # by this comparison; links may lead in a circle
        for place, folders, names in os.walk(folder, followlinks=True):
            real = {name: Path(place, name).resolve() for name in folders}
            folders[:] = [name for name in folders if real[name] not in seen]
            seen |= set(real.values())
            for name in names:
                path = os.path.join(place, name)
                if os.path.isfile(path):
                    found = os.stat(path)
                    yield os.path.relpath(path, folder), found.st_size, found.st_mtime_ns


def _parsed(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings, and the configuration files that were read for them."""
    try:
        parsed = _parser().parse_args(located(arguments)[0])
    except Exception as error:  # whatever a class that is named raises
        raise ValueError(f"The arguments of 'fit' are not accepted: {sentence(error, ['fit', *arguments])}") from error
    files = {str(path.absolute) for path in parsed.pop("config") or []}
    parsed.pop("search", None)  # where good values are looked for does not change what a run comes to
    settings: Settings = {}
    for name, leaf in _leaves(parsed):
        if name.endswith("__path__"):
            files.add(str(leaf.absolute))
        elif name != "trainer.default_root_dir":
            settings[name] = _plain(leaf)
    return settings, sorted(files)


@functools.cache
def _parser() -> ArgumentParser:
    from salun_lightning.lightning_cli import UnlearningCLI

    class ParserOnly(UnlearningCLI):
        def parse_arguments(self, *_: Any) -> None:
            self.config = Namespace(seed_everything=False)  # type: ignore[no-untyped-call]

        def instantiate_classes(self) -> None:
            """Nothing is to be made."""

    return ParserOnly(run=False).parser


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Namespace):
        node = vars(node)
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        yield name, node
    elif not node:
        yield name, EMPTY
    else:
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _plain(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, bool | int | str) or (isinstance(leaf, float) and math.isfinite(leaf)):
        return leaf
    if hasattr(leaf, "absolute"):  # a Path, or one of jsonargparse's own
        return str(leaf.absolute() if callable(leaf.absolute) else leaf.absolute)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))  # a default that is an object: what it is, the code decides


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
