"""The cases, one module a family. A module here that has ``cases()`` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from ..case import Case


def families() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def all_cases() -> list[Case]:
    """Every case of every family, in the order of the tables."""
    return [case for family in families() for case in importlib.import_module(f"{__name__}.{family}").cases()]
