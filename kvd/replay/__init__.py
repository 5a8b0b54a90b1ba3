"""``kvd replay``: what eviction policies make of a recorded trace, by the code that the daemon runs."""
