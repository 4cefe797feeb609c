"""The backend that comes with core."""
