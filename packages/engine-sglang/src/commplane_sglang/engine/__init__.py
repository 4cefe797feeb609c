"""What every adapter of an engine does, whichever the engine: look before it touches, vote, and give groups communicators.

This folder is the same, byte for byte, in each of our adapters: they are wheels of their own, and neither wants the other.
"""
