"""What every page store has to pass: ``pytest --pyargs commplane_conformance --commplane-store NAME``."""
