"""A changed model that ends its process ends no tests."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rewriter.testing.change import apart
from rewriter.testing.change.apart import APART
from rewriter.testing.change.mutations import copied

SPLIT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x) => (float[2] y) <int64 size = {%d}, int64 first = {0}> {
  parts = SplitToSequence (x, size)
  y = SequenceAt (parts, first)
}
"""


def test_what_ends_the_process_does_not_run_and_the_next_does():
    whole, deadly = (ir.from_onnx_text(SPLIT % size) for size in (2, 0))
    assert APART.settled(copied(whole), whole) is not None
    first = APART.process
    assert APART.settled(deadly, whole) is None
    assert first.poll(), "the runtime survives this model now: find another, or drop the process"
    near = APART.settled(copied(whole), whole)
    assert [node.op_type for node in near.graph] == ["SplitToSequence", "SequenceAt"]


def test_a_fault_of_its_own_is_told(monkeypatch):
    monkeypatch.setattr(apart, "_bytes", lambda model: b"no model")
    with pytest.raises(RuntimeError, match="DecodeError"):
        APART.settled(ir.from_onnx_text(SPLIT % 2), ir.from_onnx_text(SPLIT % 2))
