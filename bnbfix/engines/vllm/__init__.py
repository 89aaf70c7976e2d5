"""vLLM: its releases, its parameters, and the one that is installed."""
