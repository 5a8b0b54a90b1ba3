"""Which weights an engine runs: a commit hash, or a digest of the bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import xxhash

#: Files that hold weights.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
READ_BYTES = 8 << 20

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Unidentified(Exception):
    """Something that decides the bytes of the cache cannot be known. The text says what, for the log."""


def is_commit(text: str | None) -> bool:
    """Whether ``text`` is a full commit hash, so that it names one state of a model for ever."""
    return text is not None and _COMMIT.fullmatch(text) is not None


def weight_files(model: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files with the weights of a local model (a directory, or one file). Raises Unidentified for none."""
    path = Path(model)
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix in suffixes and f.is_file())
    if not any(f.suffix in SUFFIXES for f in files):
        raise Unidentified(f"no weights ({', '.join(SUFFIXES)}) found in {model}")
    return files


def digest(model: str, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Digest of all bytes of the files of a local model with these suffixes, and of the files' names.

    Every byte is read (at the speed of the disk, GIL released), because nothing less tells two fine-tunings of one
    model apart: same names, same sizes, same headers. Raises Unidentified, also when a file cannot be read.
    """
    total = hashlib.sha256()
    buffer = bytearray(READ_BYTES)
    view = memoryview(buffer)
    try:
        for path in weight_files(model, suffixes):
            content = xxhash.xxh3_128()
            with path.open("rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    content.update(view[:size])
            total.update(f"{path.name}:{content.hexdigest()}\n".encode())
    except OSError as error:
        raise Unidentified(f"the weights cannot be read: {error}") from error
    return "xxh3-" + total.hexdigest()


def signature(model: str, suffixes: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of those files: what shows, without reading them, that they are other ones now.

    Raises Unidentified.
    """
    try:
        found = [(path.name, path.stat()) for path in weight_files(model, suffixes)]
    except OSError as error:
        raise Unidentified(f"{model} cannot be read: {error}") from error
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
