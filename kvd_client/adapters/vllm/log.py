"""Logging under vLLM's own logger, and the guard around every hook."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from vllm.logger import init_logger

logger = init_logger("vllm.kvd")

#: A repeated complaint is logged at most once in this time.
QUIET_S = 30.0

P = ParamSpec("P")
T = TypeVar("T")

_last: dict[str, float] = {}


def complain(topic: str, message: str, *arguments: Any, exc_info: bool = False) -> None:
    """A warning, at most once in QUIET_S for each ``topic`` (a fixed word, so that the memory of it stays small)."""
    now = time.monotonic()
    if now - _last.get(topic, -QUIET_S) >= QUIET_S:
        _last[topic] = now
        logger.warning(message, *arguments, exc_info=exc_info, stacklevel=2)


def guarded(fallback: Callable[[], Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For hooks: nothing may escape into the engine. An exception is logged and ``fallback()`` returned instead.

    A hook that raises in one rank of several hangs the whole engine, so this is the connector's outermost line.
    """

    def decorate(hook: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(hook)
        def safe(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return hook(*args, **kwargs)
            except Exception:
                complain(hook.__name__, "kvd: %s failed; the engine goes on without", hook.__name__, exc_info=True)
                answer: T = fallback()
                return answer

        return safe

    return decorate
