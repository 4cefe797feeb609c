"""A stand-in with the seams of vLLM that the adapter hooks, written for these tests: groups on CPU, nothing else of it."""
