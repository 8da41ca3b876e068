"""Rule packages that import from a module's old place go on working for a release, with a warning."""

import importlib
import sys

import numpy as np
import pytest

from rewriter.quantize.types import QuantizedWeight


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("rewriter.experts", "rewriter.operators.form", "ExpertForm"),
        ("rewriter.layout.packing", "rewriter.operators.layout.packing", "pack_codes"),
        ("rewriter.layout.cutlass", "rewriter.operators.layout.cutlass", "pack"),
    ],
)
def test_an_old_place_gives_the_same_with_a_warning(old, new, name):
    for module in [m for m in sys.modules if m.startswith(("rewriter.layout", "rewriter.experts"))]:
        del sys.modules[module]
    with pytest.warns(DeprecationWarning, match="is rewriter.operators"):
        found = getattr(importlib.import_module(old), name)
    assert found is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize("name", ["matmul_nbits", "qmoe", "gather_block_quantized"])
def test_an_old_layout_packs_as_its_object_does(name):
    with pytest.warns(DeprecationWarning, match="layouts are objects"):
        for module in [m for m in sys.modules if m.startswith("rewriter.layout")]:
            del sys.modules[module]
        old = importlib.import_module(f"rewriter.layout.{name}")
    codes = np.arange(64, dtype=np.uint8).reshape(2, 32) % 16
    weight = QuantizedWeight(codes, np.ones((2, 2), np.float32), np.full((2, 2), 3, np.uint8), 4, 16)
    arrays = old.pack(weight)
    new = importlib.import_module(f"rewriter.operators.{name}").LAYOUTS[0].require(weight.shape).pack(weight)
    for a, b in zip(vars(arrays).values(), new, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(old.unpack(arrays, 2, 32, 4, 16).codes, codes)
    assert "bits is 5" in old.illegal(*((32,) if name == "gather_block_quantized" else (2, 32)), 5, 16)
