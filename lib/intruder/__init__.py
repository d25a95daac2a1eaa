"""Intruder dimensions: the definition, the runs that show them, and the views on their records."""

from .errors import InputError


__all__ = ["InputError"]
__version__ = "0.1.0"
