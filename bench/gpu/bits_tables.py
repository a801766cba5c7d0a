"""What tests/bits.py of the checkout has: the rules, coefficients and inputs that every backend is tested with."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def shared() -> Any:
    """Its conftest asks for packages that a machine with a GPU need not have, and none of them is used here."""
    if "conftest" not in sys.modules:
        sys.modules["conftest"] = stand_in = ModuleType("conftest")
        vars(stand_in)["assert_same_bits"] = None
    sys.path.append(str(Path.cwd() / "tests"))
    return importlib.import_module("bits")
