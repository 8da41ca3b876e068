import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.errors import QuantizationError
from rewriter.operators.layout import cutlass
from rewriter.operators.layout.packing import unpack_codes

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "qmoe_prepack_golden.npz")
CASES = sorted(key.removesuffix("_raw") for key in GOLDEN if key.endswith("_raw"))


@pytest.mark.parametrize("case", CASES)
def test_golden_bytes(case):
    bits, sm, n, k = map(int, re.fullmatch(r"bits(\d)_sm(\d+)_n(\d+)_k(\d+)", case).groups())
    codes = unpack_codes(GOLDEN[f"{case}_raw"], bits, k)
    packed = cutlass.pack(codes, bits, sm)
    assert packed.shape == cutlass.shape(n, k, bits)
    np.testing.assert_array_equal(packed, GOLDEN[f"{case}_packed"])
    np.testing.assert_array_equal(cutlass.unpack(GOLDEN[f"{case}_packed"], bits, sm), codes)


def test_golden_covers_both_widths_and_architectures():
    assert {tuple(case.split("_")[:2]) for case in CASES} == {
        (b, s) for b in ("bits4", "bits8") for s in ("sm80", "sm90")
    }


@st.composite
def legal_shapes(draw):
    bits, sm = draw(st.sampled_from([4, 8])), draw(st.sampled_from([80, 90]))
    k_step = 64 if sm == 80 else 128 // bits
    return bits, sm, draw(st.integers(1, 12)) * 64 // bits, draw(st.integers(1, 12)) * k_step


@given(legal_shapes(), st.integers(0, 2**31))
def test_codes_come_back(shape, seed):
    bits, sm, n, k = shape
    assert cutlass.illegal(n, k, bits, sm) is None
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, k), dtype=np.uint8)
    packed = cutlass.pack(codes, bits, sm)
    np.testing.assert_array_equal(cutlass.unpack(packed, bits, sm), codes)
    # A permutation: the same multiset of codes in other places.
    counts = np.bincount(unpack_codes(packed.reshape(-1), bits, n * k), minlength=256)
    np.testing.assert_array_equal(counts, np.bincount(codes.reshape(-1), minlength=256))


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_do_not_show(bits, sm, monkeypatch):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (64, 192), dtype=np.uint8)
    whole = cutlass.pack(codes, bits, sm)
    monkeypatch.setattr(cutlass, "_CHUNK", 192 * 20)
    np.testing.assert_array_equal(cutlass.pack(codes, bits, sm), whole)
    np.testing.assert_array_equal(cutlass.unpack(whole, bits, sm), codes)


@pytest.mark.parametrize(
    ("n", "k", "bits", "sm", "reason"),
    [
        (16, 64, 2, 80, "bits is 2"),
        (16, 64, 4, 75, "sm75"),
        (16, 96, 4, 80, "K = 96 is not a multiple of 64"),
        (16, 80, 4, 90, "K = 80 is not a multiple of 32"),
        (16, 72, 8, 90, "K = 72 is not a multiple of 16"),
        (24, 64, 4, 80, "N = 24 is not a multiple of 16"),
        (12, 64, 8, 90, "N = 12 is not a multiple of 8"),
    ],
)
def test_illegal_shapes_have_a_reason(n, k, bits, sm, reason):
    assert reason in cutlass.illegal(n, k, bits, sm)
    with pytest.raises(QuantizationError, match=reason):
        cutlass.pack(np.zeros((n, k), np.uint8), bits, sm)


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(QuantizationError, match="code 16 does not fit in 4 bits"):
        cutlass.pack(np.full((16, 64), 16, np.uint8), 4, 80)
