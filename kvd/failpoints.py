"""Named places where a crash test ends the daemon with SIGKILL, to see what its next life makes of what is left.

``_KVD_FAILPOINT=name`` or ``name:n`` in the environment arms one: the process dies when it comes by the n-th time
(the first unless said otherwise). Unarmed, a place costs one comparison.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "_KVD_FAILPOINT"

_name, _, _count = os.environ.get(VARIABLE, "").partition(":")
_left = int(_count or 1)


def reach(name: str) -> None:
    """The place ``name``; ``room.step.before`` or ``.after`` by convention."""
    if _name and name == _name:
        _hit()


def _hit() -> None:
    global _left
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
