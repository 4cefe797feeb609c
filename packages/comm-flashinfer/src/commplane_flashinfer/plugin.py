"""The entry point. Importing it loads neither torch nor flashinfer."""
