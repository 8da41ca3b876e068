"""Recognisers of other packages: the modules that the entry-point group ``rewriter.recognisers`` names.

A module adds its functions to the families it is about (``@routers.at("Sqrt")``) when it is imported.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib import metadata

from rewriter.errors import RewriterWarning

GROUP = "rewriter.recognisers"


@functools.cache
def load_recognisers() -> tuple[str, ...]:
    """Imports every module that an installed package names, once, and returns their names.

    One that does not import is a warning.
    """
    found = []
    for name in sorted({entry.value for entry in metadata.entry_points(group=GROUP)}):
        try:
            importlib.import_module(name)
            found.append(name)
        except (Exception, SystemExit) as error:  # whatever another package raises is not the fault of who runs
            reason = f"it cannot be imported: {type(error).__name__}: {error}; mend or uninstall it"
            warnings.warn(f"the recognisers of '{name}' are left out: {reason}", RewriterWarning, stacklevel=2)
    return tuple(found)
