"""What every transfer engine has to pass: ``pytest --pyargs commplane_conformance --commplane-engine NAME``."""
