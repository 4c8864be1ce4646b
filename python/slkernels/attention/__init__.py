"""Block-sparse attention."""

from . import _ops  # noqa: F401  (registers the ops)
