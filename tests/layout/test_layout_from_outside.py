"""A stored layout of another package: an order of codes, and one object; no shipped file knows it.

Source: llama.cpp's Q4_0, whose byte j of a block holds codes j and j + block / 2. No operator of a runtime reads it, so
that it is not shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from layout_strategies import assert_same, random_weight, weights

from rewriter.errors import QuantizationError
from rewriter.operators.layout.stored import Layout, Refusal


@dataclass(frozen=True)
class Halves:
    """The first half of each block in low bits, the second in high ones: [N, K / 2]."""

    def refusal(self, shape):
        return None if shape.bits == 4 and shape.block and not shape.k % shape.block else "only whole blocks of 4 bits"

    def shape(self, shape):
        return shape.n, shape.k // 2

    def pack(self, codes, bits):
        low, high = np.split(codes.reshape(len(codes), -1, 2, self.half), 2, axis=2)
        return (low | high << 4).reshape(len(codes), -1)

    def unpack(self, packed, shape):
        halves = packed.reshape(shape.n, -1, 1, self.half)
        return np.concatenate([halves & 15, halves >> 4], axis=2).reshape(shape.n, shape.k)

    half: int = 16


def refuse(shape):
    return None if shape.block == 32 else "blocks are of 32"


LLAMA = Layout("llama", "matmul_nbits", Halves(), refuse, lambda shape: (shape.n, shape.blocks))


@given(weights())
def test_what_it_holds_comes_back_and_the_rest_is_refused(q):
    stored = LLAMA.of(q.shape)
    if isinstance(stored, Refusal):
        assert q.shape.block != 32 or q.bits != 4 or q.shape.k % 32
        with pytest.raises(QuantizationError, match="blocks"):
            LLAMA.require(q.shape)
        return
    assert_same(stored.unpack(stored.pack(q)), q)


@pytest.mark.parametrize("symmetric", [True, False])
def test_its_bytes_are_in_its_order(symmetric):
    q = random_weight(3, 64, 4, 32, symmetric=symmetric)
    stored = LLAMA.require(q.shape)
    assert [part.name for part in stored.parts(1)] == ["q4", "scales", *([] if symmetric else ["zero_points"])]
    codes, *_ = stored.pack(q)
    assert codes.shape == (3, 32)
    assert codes[1, 17] == q.codes[1, 33] | q.codes[1, 49] << 4
    assert_same(stored.unpack(stored.pack(q)), q)
