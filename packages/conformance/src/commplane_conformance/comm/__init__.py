"""Tests of communicator backends. Run by ``pytest --pyargs commplane_conformance --commplane-backend NAME``."""
