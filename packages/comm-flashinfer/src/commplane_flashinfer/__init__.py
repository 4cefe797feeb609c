"""FlashInfer's fused all-reduce as a backend of commplane. Importing it loads neither torch nor flashinfer."""

__version__ = "0.1.0"
