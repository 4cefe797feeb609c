"""Transfer engines: shared memory and TCP, built in, and NIXL and Mooncake where they are installed.

Each passes ``pytest --pyargs commplane_conformance --commplane-engine NAME``. Importing this loads none of them.
"""
