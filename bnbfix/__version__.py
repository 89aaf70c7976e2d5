"""The version, for whoever states it."""

__version__ = "0.1.0"
