"""A changed model that ends its process ends no tests."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rewriter.testing.change import apart
from rewriter.testing.change.apart import Apart
from rewriter.testing.change.mutations import RefusedError, copied

MODEL = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Neg (x) }'
ABORTS = "import os, sys; sys.stdin.buffer.read(1); os.abort()"


@pytest.fixture
def process():
    process = Apart()
    yield process
    process.stop()


def test_what_ends_the_process_does_not_run_and_the_next_does(process, monkeypatch):
    """Which models end it differs from one release of the runtime to the next, so here it ends by itself."""
    model = ir.from_onnx_text(MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(apart, "_CODE", ABORTS)
        with pytest.raises(RefusedError, match="it ends the process that runs it"):
            process.settled(copied(model), model)
    assert process.process is None
    near = process.settled(copied(model), model)
    assert [node.op_type for node in near.graph] == ["Neg"]
    assert process.process.poll() is None


def test_a_fault_of_its_own_is_told(process, monkeypatch):
    monkeypatch.setattr(apart, "_bytes", lambda model: b"no model")
    with pytest.raises(RuntimeError, match="DecodeError"):
        process.settled(ir.from_onnx_text(MODEL), ir.from_onnx_text(MODEL))
