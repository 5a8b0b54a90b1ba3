"""The connector's options: the keys of ``kv_connector_extra_config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Options:
    """All of them may be left out."""

    #: ``unix:PATH`` or ``tcp://HOST:PORT``; None = the local daemon's socket.
    endpoint: str | None = None
    #: Loads run beside the engine's steps; False: within the step that needs the pages, layer by layer.
    load_async: bool = True
    #: Longest time a scheduler step waits for the daemon to answer a lookup.
    lookup_timeout_s: float = 0.1
    #: Longest time a request waits for chunks on their way into the daemon's memory, from a disk or because a restarted
    #: daemon checks them first; what has not come by then is computed. 0: nothing is waited for. A disk brings about as
    #: many tokens in a second as a GPU computes, so waiting for longer is seldom worth it.
    promote_timeout_s: float = 1.0
    #: A load that has not arrived after this time is computed instead.
    load_timeout_s: float = 5.0
    #: Longest time a finished request's blocks are kept for a store that has not started.
    store_timeout_s: float = 1.0
    #: Tokens of a chunk, a multiple of the engine's block; None = chosen from the model.
    chunk_tokens: int | None = None


def _wrong(name: str, value: Any) -> str | None:
    """What would be right, when ``value`` is not."""
    if name == "endpoint":
        return None if value is None or (isinstance(value, str) and value) else "unix:PATH or tcp://HOST:PORT"
    if name == "load_async":
        return None if isinstance(value, bool) else "true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "chunk_tokens":
        return None if value is None or (number and value == int(value) > 0) else "a number of tokens"
    if name == "promote_timeout_s" and number and value == 0:
        return None
    return None if number and 0 < value <= 3600 else "a time in seconds, above 0"


def parse_options(extra: Mapping[str, Any]) -> tuple[Options, list[str]]:
    """The options, and one sentence for every entry that was wrong and has been left out.

    A mistake here must not keep an engine from starting: it is for the caller to log.
    """
    known = {f.name for f in fields(Options)}
    good: dict[str, Any] = {}
    problems = []
    for name, value in extra.items():
        if name not in known:
            problems.append(f"unknown key {name!r}: the keys are {', '.join(sorted(known))}")
        elif (right := _wrong(name, value)) is not None:
            problems.append(f"{name} = {value!r} is not {right}; left at {getattr(Options, name)!r}")
        else:
            good[name] = value
    return Options(**good), problems
