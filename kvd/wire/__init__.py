"""All that daemon and client share. The client imports nothing else of ``kvd``."""
