"""Recognisers of other packages: the modules that the entry-point group ``rewriter.recognisers`` names.

A module adds its functions to the families it is about (``@routers.at("Sqrt")``) when it is imported.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib import metadata

GROUP = "rewriter.recognisers"


@functools.cache
def load_recognisers() -> None:
    """Imports every module that an installed package names; once. One that does not import is a warning."""
    for name in sorted({entry.value for entry in metadata.entry_points(group=GROUP)}):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever another package raises is not the fault of who runs
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"the recognisers of '{name}' are left out, it cannot be imported: {reason}", stacklevel=2)
