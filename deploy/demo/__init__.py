"""The demo: replicas of one model share one daemon."""
