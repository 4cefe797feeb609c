"""MPI as a backend of commplane: plugin.py says what it can do, probe.py whether it can be used here, backend.py does it."""
