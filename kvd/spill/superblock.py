"""What a spill directory says of itself: the file ``superblock`` and its copy.

They hold the secret without which no header in the directory can be believed, so there are two of them: one that is
damaged is written anew from the other. With both lost, or of another format, the directory starts anew: it is a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import struct
from dataclasses import dataclass, field

from kvd.failpoints import reach
from kvd.spill.record import FORMAT_VERSION, PAGE_BYTES, SECRET_BYTES

log = logging.getLogger(__name__)

FILES = ("superblock", "superblock.copy")
_MAGIC = b"kvd:sup\x01"
_LAYOUT = struct.Struct(f"<8sHHIQ16s{SECRET_BYTES}s")
_UUID_BYTES = 16


class Unusable(Exception):
    """There is a superblock, and this daemon cannot work with it; the text says why."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """Who the directory is, what its headers are keyed with, and how large its extents are."""

    uuid: bytes
    secret: bytes = field(repr=False)
    extent_bytes: int


def load(directory: str) -> Superblock | None:
    """The superblock of ``directory``, None when it has none. A damaged copy is mended.

    Raises Unusable when there is one and it is damaged or of another format, OSError when it cannot be read.
    """
    found: dict[str, Superblock] = {}
    why = ""
    for name in FILES:
        try:
            found[name] = _read(os.path.join(directory, name))
        except FileNotFoundError:
            continue
        except Unusable as error:
            why = f"{name} {error}"
    if not found:
        if why:
            raise Unusable(why)
        return None
    superblock = found.get(FILES[0]) or found[FILES[1]]
    if len(set(found.values())) != 1 or len(found) != len(FILES):
        log.warning("%s: one of the superblock's two files was missing or damaged; mended", directory)
        write(directory, superblock)
    return superblock


def create(directory: str, extent_bytes: int) -> Superblock:
    """Writes a new superblock, in place of any other. It is on the disk when this returns. Raises OSError."""
    superblock = Superblock(os.urandom(_UUID_BYTES), secrets.token_bytes(SECRET_BYTES), extent_bytes)
    write(directory, superblock)
    return superblock


def write_file(path: str, content: bytes) -> None:
    """Replaces a small file as a whole; it is on the disk when this returns. Raises OSError."""
    unfinished = path + ".new"
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
    os.rename(unfinished, path)
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(directory: str, superblock: Superblock) -> None:
    """Writes both files of ``superblock``. On the disk when this returns. Raises OSError."""
    reach("spill.superblock.before")
    body = _LAYOUT.pack(_MAGIC, FORMAT_VERSION, 0, 0, superblock.extent_bytes, superblock.uuid, superblock.secret)
    for name in FILES:
        write_file(os.path.join(directory, name), (body + _digest(body)).ljust(PAGE_BYTES, b"\0"))
    reach("spill.superblock.after")


def _read(path: str) -> Superblock:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with contextlib.closing(os.fdopen(fd, "rb")) as file:
        content = file.read(PAGE_BYTES)
    body, rest = content[: _LAYOUT.size], content[_LAYOUT.size :]
    if len(body) < _LAYOUT.size or not body.startswith(_MAGIC):
        raise Unusable("is damaged")
    _, version, _, _, extent_bytes, uuid, secret = _LAYOUT.unpack(body)
    if version != FORMAT_VERSION:
        raise Unusable(f"has format {version}, this daemon has {FORMAT_VERSION}")
    if not rest.startswith(_digest(body)) or extent_bytes < 2 * PAGE_BYTES or extent_bytes % PAGE_BYTES:
        raise Unusable("is damaged")
    return Superblock(uuid, secret, extent_bytes)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()
