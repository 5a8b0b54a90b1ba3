"""The books: chunk states, prefix index, leases, eviction. Pure Python, no I/O, owned by the event loop."""
