"""kvd: KV-cache-as-a-service for LLM serving. This package is the daemon; ``kvd_client`` is the client."""
