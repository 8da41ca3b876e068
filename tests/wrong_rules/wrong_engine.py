"""Mistakes in the engine itself: between a proof and the file that is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from block_models import Spelling, block_model
from embedding_models import graph_of
from mistakes import Mistake


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def experts() -> ir.Model:
    """Experts in plain operators: fused, quantized and written as stacks."""
    return ir.from_proto(block_model(Spelling(hidden=32, inter=32, experts=4, weights="own")))


def linears() -> ir.Model:
    """Two products of one shape."""
    weights = {"v": _normal(64, 64), "w": _normal(64, 64, seed=1)}
    return ir.from_proto(
        graph_of("agraph (float[t, 64] x) => (float[t, 64] y) { h = MatMul(x, v) y = MatMul(h, w) }", weights)
    )


def stack() -> ir.Model:
    """A stack of matrices that is read whole and transposed: it becomes a copy."""
    text = 'agraph (float[3, t, 64] x) => (float[3, t, 32] y) { y = Einsum<equation="eti,ehi->eth">(x, w) }'
    return ir.from_proto(graph_of(text, {"w": _normal(3, 32, 64)}))


MODELS = {"experts": (experts, "moe-int4"), "linears": (linears, "rtn"), "stack": (stack, ["einsum-to-matmul"])}
"""Name -> what makes a model, and the rule set that it is rewritten by."""

_FIRST_LIKE = "next(o for o in external[::-1] if (o.dtype, o.shape) == (e.dtype, e.shape))"
_FIRST_SLOT_LIKE = (
    "next(o for o in absent[::-1] if (o.tensor.dtype, o.tensor.shape) == (e.tensor.dtype, e.tensor.shape))"
)


@dataclass(frozen=True)
class EngineMistake:
    """A wrong version of a part of the engine.

    Attributes:
        mistake: where it is, and what is wrong.
        model: which of the models shows it.
        sharded: whether it shows where weights go to data files, or where the model is one file.
        caught: what the error says.
    """

    mistake: Mistake
    model: str
    sharded: bool
    caught: str = field(repr=False)


def _wrong(name: str, path: str, right: str, wrong: str, model: str, sharded: bool, caught: str) -> EngineMistake:
    return EngineMistake(Mistake("engine", name, path, [(right, wrong)], lambda: None), model, sharded, caught)


ENGINE = (
    _wrong(
        "equal-sized tensors crossed in the data file",
        "rewriter/io/streaming.py",
        "for tensor, stored in zip(shard, external, strict=True)",
        f"for tensor, stored in zip(shard, [{_FIRST_LIKE} for e in external], strict=True)",
        "linears",
        True,
        "does not hold what was computed for it",
    ),
    _wrong(
        "equal-sized tensors crossed in the model file",
        "rewriter/io/streaming.py",
        "pool.map(read, absent)",
        f"[read({_FIRST_SLOT_LIKE}) for e in absent]",
        "linears",
        False,
        "does not hold what was computed for it",
    ),
    _wrong(
        "the rows of a part reversed after it was computed",
        "rewriter/quantize/job.py",
        "self._kept = dict(enumerate(arrays))",
        "self._kept = {i: a[::-1] for i, a in enumerate(arrays)}",
        "linears",
        True,
        "differs by",
    ),
    _wrong(
        "a weight laid out right, proved, and handed on wrong as it is written",
        "rewriter/quantize/job.py",
        "    return arrays",
        "    return arrays if job._kept else [a[::-1] for a in arrays]",
        "linears",
        True,
        "as it was written, and of",
    ),
    _wrong(
        "the codes of a stack written in another order than they were computed",
        "rewriter/quantize/stack.py",
        "file.write(np.ascontiguousarray(codes).data)",
        "file.write(np.ascontiguousarray(codes[::-1]).data)",
        "experts",
        True,
        "does not hold what was computed for it",
    ),
    _wrong(
        "the scales of the first expert for all",
        "rewriter/quantize/stack.py",
        "part.dtype))[expert] = part",
        "part.dtype))[:] = part",
        "experts",
        True,
        "differs by",
    ),
    _wrong(
        "the first rows of a stack for all, where it is copied into a data file",
        "rewriter/tensors/view.py",
        "self.view.slice(0, row, 1)",
        "self.view.slice(0, 0, 1)",
        "stack",
        True,
        "is not its source's as it was written",
    ),
    _wrong(
        "constants of one shape shared, whatever they hold",
        "rewriter/engine/commit.py",
        'return getattr(tensor, "key", None) or ("view", View.whole(tensor, ""))',
        "return tensor.dtype, tuple(tensor.shape.numpy())",
        "linears",
        True,
        "would share the constant",
    ),
    _wrong(
        "jobs that differ in their weight taken for equal",
        "rewriter/quantize/job.py",
        "return (self.weight, self.context.spec,",
        "return (self.weight.shape, self.context.spec,",
        "linears",
        True,
        "would share the constant",
    ),
    _wrong(
        "a node that reads another weight in the file",
        "rewriter/io/saving.py",
        "    proto = ir.to_proto(model)",
        "    proto = ir.to_proto(model); proto.graph.node[1].input[1] = proto.graph.node[0].input[1]",
        "linears",
        False,
        "reads or computes other values",
    ),
)
