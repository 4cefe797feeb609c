"""A pytest plugin with which any commplane backend proves itself, on processes.

    pytest --pyargs commplane_conformance --commplane-backend NAME

Importing this package imports nothing else: the plugin is loaded in every pytest run of an environment that has the wheel.
"""
