import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.errors import QuantizationError
from rewriter.operators.layout.packing import pack_codes, packed_width, unpack_codes

SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=2).flatmap(
    lambda lead: st.integers(1, 70).map(lambda k: (*lead, k))
)


@given(SHAPES, st.sampled_from([2, 3, 4, 8]), st.integers(0, 3), st.integers(0, 2**31))
def test_codes_come_back(shape, bits, pad, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)
    packed = pack_codes(codes, bits, pad=pad)
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], bits))
    np.testing.assert_array_equal(unpack_codes(packed, bits, shape[-1]), codes)


def test_low_bits_come_first_and_the_last_byte_is_padded():
    np.testing.assert_array_equal(pack_codes(np.array([1, 2, 3], np.uint8), 4, pad=8), [0x21, 0x83])
    np.testing.assert_array_equal(pack_codes(np.array([1, 2, 3, 0, 3], np.uint8), 2, pad=2), [0b00111001, 0b10101011])


def test_eight_codes_of_three_bits_share_three_bytes():
    codes = np.array([1, 2, 3, 4, 5, 6, 7, 0, 5], np.uint8)
    packed = int.from_bytes(pack_codes(codes, 3).tobytes(), "little")
    assert [packed >> 3 * i & 7 for i in range(9)] == codes.tolist()


def test_more_codes_than_one_chunk():
    codes = np.random.default_rng(0).integers(0, 16, (5, 100_001), dtype=np.uint8)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 4), 4, 100_001), codes)


def test_any_memory_order():
    codes = np.random.default_rng(0).integers(0, 16, (64, 48), dtype=np.uint8)
    np.testing.assert_array_equal(pack_codes(codes.T, 4), pack_codes(np.ascontiguousarray(codes.T), 4))
    packed = np.asfortranarray(pack_codes(codes, 4))
    np.testing.assert_array_equal(unpack_codes(packed, 4, 48), codes)


def test_the_result_never_aliases_its_source():
    codes = np.zeros((2, 4), np.uint8)
    assert not np.shares_memory(pack_codes(codes, 8), codes)
    assert not np.shares_memory(unpack_codes(codes, 8, 4), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_that_does_not_fit_is_refused(bits):
    codes = np.array([[0, 1 << bits]], np.uint8)
    with pytest.raises(QuantizationError, match=f"code {1 << bits} does not fit in {bits} bits"):
        pack_codes(codes, bits)


def test_wrong_arguments_are_refused():
    with pytest.raises(QuantizationError, match="5 bits"):
        pack_codes(np.zeros(4, np.uint8), 5)
    with pytest.raises(QuantizationError, match="uint8"):
        pack_codes(np.zeros(4, np.int8), 4)
    with pytest.raises(QuantizationError, match="cannot hold 5 codes"):
        unpack_codes(np.zeros((3, 2), np.uint8), 4, 5)
