"""Rule packages that import from a module's old place go on working for a release, with a warning."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("rewriter.experts", "rewriter.operators.form", "ExpertForm"),
        ("rewriter.layout.packing", "rewriter.operators.layout.packing", "pack_codes"),
        ("rewriter.layout.matmul_nbits", "rewriter.operators.layout.matmul_nbits", "unpack"),
    ],
)
def test_an_old_place_gives_the_same_with_a_warning(old, new, name):
    for module in [m for m in sys.modules if m.startswith(("rewriter.layout", "rewriter.experts"))]:
        del sys.modules[module]
    with pytest.warns(DeprecationWarning, match="is rewriter.operators"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)
