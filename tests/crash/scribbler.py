"""An engine that never notices that its daemon has died: it writes into the slots it was granted until it is killed.

    python -m tests.crash.scribbler ENDPOINT SEED

Prints ``writing BYTES`` once it is at it: of its slots. It writes rubbish, as copies do that were set up long ago.
"""

from __future__ import annotations

import random
import sys
import time

from kvd_client import Client
from tests.crash.house import SCRIBBLED
from tests.soak.corpus import chained


def main() -> int:
    """The process."""
    endpoint, dice = sys.argv[1], random.Random(sys.argv[2])
    client = Client(endpoint, name="scribbler", timeout_s=10)
    client.connect(20)
    path = client.path()
    namespace = client.namespace(SCRIBBLED.identity, SCRIBBLED.chunk_bytes)
    views: list[memoryview] = []
    while not views:
        keys = SCRIBBLED.keys(dice.randrange(SCRIBBLED.prefixes))
        lease = client.reserve(namespace, chained(keys))
        found = (path.view(at.location, SCRIBBLED.chunk_bytes) for at in lease.results if at.location is not None)
        views = [view for view in found if view is not None]
    print(f"writing {len(views) * SCRIBBLED.chunk_bytes}", flush=True)
    while True:
        for view in views:
            view[:] = dice.randbytes(len(view))
        time.sleep(0.001)


if __name__ == "__main__":
    sys.exit(main())
