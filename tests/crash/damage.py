"""Damage to files, as disks and people do it: seeded, so that what went wrong once can be had again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

PAGE_BYTES = 4096


def flip_bits(path: Path, dice: random.Random) -> None:
    """Turns over a few bits, some of them near each other."""
    size = path.stat().st_size
    if not size:
        return
    at = dice.randrange(size)
    with path.open("r+b", buffering=0) as file:
        for _ in range(dice.randint(1, 12)):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << dice.randrange(8)]))
            at = dice.randrange(size) if dice.random() < 0.5 else min(size - 1, at + dice.randrange(300))


def zero_pages(path: Path, dice: random.Random) -> None:
    """Some pages are zeros, as they are when a write got lost."""
    _overwrite(path, dice, lambda length: bytes(length))


def scramble(path: Path, dice: random.Random) -> None:
    """Some bytes are others altogether."""
    _overwrite(path, dice, dice.randbytes)


def copy_pages(path: Path, dice: random.Random) -> None:
    """Some pages are those of another place of the same file, as they are when a write went astray."""
    pages = path.stat().st_size // PAGE_BYTES
    if pages < 2:
        return
    with path.open("r+b", buffering=0) as file:
        for _ in range(dice.randint(1, 4)):
            source, target = dice.sample(range(pages), 2)
            length = PAGE_BYTES * min(dice.randint(1, 8), pages - max(source, target))
            found = os.pread(file.fileno(), length, source * PAGE_BYTES)
            os.pwrite(file.fileno(), found, target * PAGE_BYTES)


def cut_short(path: Path, dice: random.Random) -> None:
    """The end is missing, or everything."""
    os.truncate(path, dice.choice((0, dice.randrange(path.stat().st_size + 1))))


def grow(path: Path, dice: random.Random) -> None:
    """There is more than there was."""
    with path.open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 3 * PAGE_BYTES)))


def remove(path: Path, dice: random.Random) -> None:
    """It is gone."""
    path.unlink()


Way = Callable[[Path, random.Random], None]

#: What leaves a file as long as it was: all that can be done to one that is mapped.
IN_PLACE: tuple[Way, ...] = (flip_bits, zero_pages, scramble, copy_pages)
WAYS: tuple[Way, ...] = (*IN_PLACE, cut_short, grow, remove)


def damage(paths: Iterable[Path], dice: random.Random, ways: tuple[Way, ...] = WAYS, share: float = 0.5) -> list[str]:
    """Damages about ``share`` of the files, one at least; what was done, for people."""
    found = sorted(path for path in paths if path.is_file() and not path.is_symlink())
    victims = [path for path in found if dice.random() < share] or [dice.choice(found)]
    done = []
    for path in victims:
        way = dice.choice(ways)
        way(path, dice)
        done.append(f"{way.__name__} {path.name}")
    return done


def _overwrite(path: Path, dice: random.Random, make: Callable[[int], bytes]) -> None:
    size = path.stat().st_size
    if not size:
        return
    with path.open("r+b", buffering=0) as file:
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(size)
            at -= at % dice.choice((1, PAGE_BYTES))
            file.seek(at)
            file.write(make(min(dice.randint(1, 3 * PAGE_BYTES), size - at)))
