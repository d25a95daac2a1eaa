"""Intruder dimensions: the definition, the runs that show them, and the views on their records."""

from .errors import InputError
from .intruders import count_intruders, max_cosines

__all__ = ["InputError", "count_intruders", "max_cosines"]
__version__ = "0.1.0"
