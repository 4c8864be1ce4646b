"""The optional packages of the benchmarks."""

from __future__ import annotations

import importlib


class MissingExtra(RuntimeError):
    """A package of the extra ``bench`` is not installed; the message says how to get it."""


def need(*packages: str) -> None:
    """Raise MissingExtra unless all of the packages can be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtra(
                f"slkernels.bench needs {package} ({error}): pip install 'slkernels[bench]', "
                f"or from a checkout pip install {' '.join(packages)}"
            ) from error
