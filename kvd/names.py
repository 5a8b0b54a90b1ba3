"""What outlives the daemon of a namespace: one small file that says whose bytes they are.

The pool's slot table and the records on the disks know a namespace by its id alone. ``<id>.json`` has the identity and
the tenant that make that id, and the chunk size. It is replaced as a whole or not at all, and believed only if its
content makes the id in its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvd.types import Namespace
from kvd.wire.identity import MAX_EXTRA, MAX_FIELD_CHARS, Identity

log = logging.getLogger(__name__)

FORMAT = 1
#: A file that is larger was not written here: every text of an identity at its longest, each character escaped.
MAX_FILE_BYTES = 12 * MAX_FIELD_CHARS * (2 * MAX_EXTRA + 16)
#: Files that are read from one directory.
MAX_FILES = 1 << 14

_NAME = re.compile(r"([0-9a-f]{64})\.json")
_NUMBERS = frozenset(("num_layers", "num_kv_heads", "block_tokens", "chunk_blocks", "format_version"))
_FIELDS = frozenset(Identity.__dataclass_fields__) - {"extra"}


def save(directory: str, namespace: Namespace) -> None:
    """Writes the file of ``namespace``, and makes ``directory`` when it is missing. On the disk when this returns.

    Raises OSError.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = _path(directory, namespace.id)
    unfinished = path + ".new"
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(_encode(namespace))
        file.flush()
        os.fsync(fd)
    os.rename(unfinished, path)
    _sync(directory)


def load(directory: str) -> dict[bytes, Namespace]:
    """Every namespace that has a file in ``directory``, by id. What is no such file, or not intact, is left out.

    Raises OSError when the directory exists and cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return {}
    found: dict[bytes, Namespace] = {}
    for name in names:
        if len(found) == MAX_FILES:
            log.warning("%s: more than %d namespaces; the others are forgotten", directory, MAX_FILES)
            break
        if name.endswith(".json.new"):  # a save that was cut short
            continue
        try:
            namespace = _read(directory, name)
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s: %r is not the file of a namespace: %s", directory, name, error)
            continue
        found[namespace.id] = namespace
    return found


def remove(directory: str, namespace_id: bytes) -> None:
    """Removes the file of a namespace, if there is one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(directory, namespace_id))


def _path(directory: str, namespace_id: bytes) -> str:
    return os.path.join(directory, namespace_id.hex() + ".json")


def _encode(namespace: Namespace) -> bytes:
    content = {
        "format": FORMAT,
        "namespace": json.loads(namespace.identity.canonical(namespace.tenant)),
        "chunk_bytes": namespace.chunk_bytes,
        "checksum": _checksum(namespace.id, namespace.chunk_bytes),
    }
    return json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n"


def _read(directory: str, name: str) -> Namespace:
    """Raises ValueError, RecursionError and OSError for what is not a file of ours."""
    matched = _NAME.fullmatch(name)
    if matched is None:
        raise ValueError("its name is no id")
    fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ValueError("it is not a plain file of this user")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError("it is too large")
    namespace = _decode(json.loads(data))
    if namespace.id.hex() != matched[1]:
        raise ValueError("its content belongs to another id")
    return namespace


def _decode(content: Any) -> Namespace:
    match content:
        case {
            "format": int(version),
            "namespace": {"tenant": str(tenant), "identity": dict(fields), "extra": dict(extra)},
            "chunk_bytes": int(chunk_bytes),
            "checksum": str(checksum),
        }:
            pass
        case _:
            raise ValueError("something is missing in it")
    if version != FORMAT:
        raise ValueError(f"it has format {version}")
    identity = _identity(fields, extra)
    namespace_id = identity.namespace_id(tenant)
    if not 0 < chunk_bytes < 1 << 63 or checksum != _checksum(namespace_id, chunk_bytes):
        raise ValueError("it is damaged")
    return Namespace(namespace_id, tenant, identity, chunk_bytes)


def _identity(fields: Mapping[str, Any], extra: Mapping[str, Any]) -> Identity:
    if fields.keys() != _FIELDS:
        raise ValueError("its identity has other fields")
    right_types = all(type(value) is (int if name in _NUMBERS else str) for name, value in fields.items())
    texts = [value for value in (*fields.values(), *extra, *extra.values()) if type(value) is str]
    if not right_types or len(texts) != len(fields) - len(_NUMBERS) + 2 * len(extra):
        raise ValueError("its identity has values of other types")
    if len(extra) > MAX_EXTRA or any(len(text) > MAX_FIELD_CHARS for text in texts):
        raise ValueError("its identity is too large")
    return Identity(**fields, extra=MappingProxyType(dict(extra)))


def _checksum(namespace_id: bytes, chunk_bytes: int) -> str:
    return hashlib.sha256(namespace_id + chunk_bytes.to_bytes(8, "little")).hexdigest()


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
