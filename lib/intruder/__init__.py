"""Intruder dimensions: the definition, the runs that show them, and the views on their records.

`import intruder` loads numpy only. What needs torch is imported when it is first asked for, by `intruder.compare` or
`from intruder import compare`; no module of the package may therefore be called like one of these names.
"""

import importlib
from typing import TYPE_CHECKING

from .errors import InputError
from .intruders import count_intruders, max_cosines

if TYPE_CHECKING:
    from .basis import Basis, BasisStore
    from .comparison import Comparison, compare
    from .spectrum import LowRank

__all__ = [
    "Basis",
    "BasisStore",
    "Comparison",
    "InputError",
    "LowRank",
    "compare",
    "count_intruders",
    "max_cosines",
]
__version__ = "0.1.0"

_NEED_TORCH = {
    "Basis": "basis",
    "BasisStore": "basis",
    "Comparison": "comparison",
    "LowRank": "spectrum",
    "compare": "comparison",
}


def __getattr__(name: str):
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_NEED_TORCH[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
