"""The same harness in front of vLLM on a GPU: see `run`."""
