"""A stand-in with the seams of SGLang that the adapter hooks, written for these tests: groups on CPU, nothing else of it."""
