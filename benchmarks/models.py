"""Models of any size: unrolled Mixture-of-Experts layers, spelled as mobius writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from rewriter.quantize.formats import E2M1

Weights = Callable[[str, tuple[int, ...]], ir.TensorProtocol]
"""Makes the tensor of a weight from its name and shape."""


def random_weights(dtype: str = "float32", seed: int = 0) -> Weights:
    """Weights in memory, N(0, 1/K)."""
    generator = np.random.default_rng(seed)

    def make(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        return ir.tensor(values.astype(dtype), name=name)

    return make


def weights_on_disk(file: Path, seed: int = 0, *, born: bool = False) -> Weights:
    """float16 weights appended to ``file``: windows of one random block, so that 20 GB take seconds, not minutes.

    Those that are ``born`` lie on a grid of mxfp4, whichever way they are turned.
    """
    generator = np.random.default_rng(seed)
    if born:
        block = np.array(E2M1, np.float16)[generator.integers(0, 16, 1 << 25, dtype=np.uint8)] / np.float16(256)
    else:
        block = (generator.standard_normal(1 << 25, dtype=np.float32) * np.float32(0.02)).astype(np.float16)

    def make(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        offset = file.stat().st_size if file.exists() else 0
        left = int(np.prod(shape))
        with file.open("ab") as stream:
            while left:
                start = int(generator.integers(0, block.size // 2))
                part = block[start : start + min(left, block.size // 2)]
                part.tofile(stream)
                left -= part.size
        length = file.stat().st_size - offset
        return ir.ExternalTensor(
            file.name, offset, length, ir.DataType.FLOAT16, shape=ir.Shape(shape), name=name, base_dir=file.parent
        )

    return make


def unrolled_model(
    layers: int,
    experts: int,
    *,
    hidden: int = 32,
    intermediate: int = 16,
    top_k: int = 2,
    weights: Weights | None = None,
    vocabulary: int = 0,
    loop: bool = False,
) -> ir.Model:
    """Returns ``layers`` unrolled SwiGLU MoE layers with residuals; x [T, H] in, y [T, V] out.

    Twelve nodes of every expert move weights or multiply, six more mix its output in: 69,000 nodes at 30 x 128. A
    ``loop`` takes the rows of each expert and adds its output to them, by 14 nodes, as dynamo writes transformers 4.36
    to 4.52: 100,000 nodes. With a ``vocabulary`` each layer also has four attention-sized projections. The model ends
    in a head [H, V].
    """
    make = weights or random_weights()
    tape = Tape()

    def weight(name: str, *shape: int) -> ir.Value:
        return tape.initializer(make(name, shape))

    def integers(name: str, *values: int) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(values, dtype=np.int64), name=name))

    index = [integers(f"index_{e}", e) for e in range(experts)]
    scalar = [tape.initializer(ir.tensor(np.int64(e), name=f"expert_{e}")) for e in range(experts)]
    k, last = integers("k", top_k), integers("last_axis", -1)
    first, one, two = integers("first", 0), integers("one", 1), integers("two", 2)
    everyone, zero = integers("everyone", *range(experts)), tape.initializer(ir.tensor(np.float32(0), name="zero"))
    head = weight("head.weight", hidden, vocabulary or 1)
    x = ir.val("x", head.dtype, ["T", hidden])
    widths = {
        "H": hidden,
        "I": intermediate,
        "2I": 2 * intermediate,
        "V": vocabulary or 1,
        "E": experts,
        "k": top_k,
        "1": 1,
    }
    cuts = ((first, one, one), (one, two, one))

    def typed(value: ir.Value, width: str, dtype: ir.DataType | None = None, rows: str = "T") -> ir.Value:
        value.dtype, value.shape = dtype or x.dtype, ir.Shape([rows, widths[width]])
        return value

    def integer(value: ir.Value, *dims: int | str) -> ir.Value:
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape(dims)
        return value

    def op(op_type: str, inputs: list[ir.Value], width: str = "", rows: str = "T", **attributes: object) -> ir.Value:
        out = tape.op(op_type, inputs, attributes or None)
        return typed(out, width, rows=rows) if width else out

    def slice_of(stack: ir.Value, expert: int) -> ir.Value:
        gathered = op("Gather", [stack, index[expert]], axis=0)
        return op("Transpose", [op("Squeeze", [gathered, index[0]])])

    y = x
    for layer in range(layers):
        prefix = f"layers.{layer}"
        if vocabulary:
            for name in ("q", "k", "v", "o"):
                y = op("MatMul", [y, weight(f"{prefix}.attention.{name}.weight", hidden, hidden)], "H")
        router = weight(f"{prefix}.router.weight", hidden, experts)
        gate_up = weight(f"{prefix}.experts.gate_up.weight", experts, 2 * intermediate, hidden)
        down = weight(f"{prefix}.experts.down.weight", experts, hidden, intermediate)
        normed = op("Mul", [y, weight(f"{prefix}.norm.weight", hidden)], "H")
        logits = op("MatMul", [normed, router], "E")
        values, chosen = tape.op_multi_out("TopK", [logits, k], {"axis": -1}, num_outputs=2)
        typed(values, "k"), typed(chosen, "k", ir.DataType.INT64)
        mixing = op("Softmax", [values], "k", axis=-1)
        routed: ir.Value | None = None
        if loop:
            hot = op("Cast", [op("Equal", [op("Unsqueeze", [chosen, last]), everyone])], to=int(ir.DataType.INT64))
            masks, shares = op("Transpose", [hot], perm=[2, 1, 0]), op("Unsqueeze", [mixing, two])
            routed = op("Expand", [zero, op("Shape", [normed])], "H")
        for e in range(experts):
            rows, read = (f"hits_{layer}_{e}", normed) if loop else ("T", normed)
            if loop:
                mask = integer(op("Gather", [masks, scalar[e]], axis=0), top_k, "T")
                hits = integer(op("Transpose", [integer(op("NonZero", [mask]), 2, rows)], perm=[1, 0]), rows, 2)
                columns = (integer(op("Slice", [hits, *ends]), rows, 1) for ends in cuts)
                flat = [integer(op("Squeeze", [column, one]), rows) for column in columns]
                slots, tokens = (integer(op("Unsqueeze", [column, last]), rows, 1) for column in flat)
                read = op("GatherND", [normed, tokens], "H", rows)
            both = op("MatMul", [read, slice_of(gate_up, e)], "2I", rows)
            gate, up = tape.op_multi_out("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
            typed(gate, "I", rows=rows), typed(up, "I", rows=rows)
            silu = op("Mul", [gate, op("Sigmoid", [gate], "I", rows)], "I", rows)
            out = op("MatMul", [op("Mul", [silu, up], "I", rows), slice_of(down, e)], "H", rows)
            if loop:
                pairs = integer(op("Concat", [tokens, slots], axis=-1), rows, 2)
                share = op("GatherND", [shares, pairs], "1", rows)
                term = op("Mul", [out, share], "H", rows)
                routed = op("ScatterND", [routed, tokens, term], "H", reduction="add")
                continue
            hit = typed(tape.op("Equal", [chosen, scalar[e]]), "k", ir.DataType.BOOL)
            mask = op("Cast", [hit], "k", to=int(x.dtype or ir.DataType.FLOAT))
            share = op("ReduceSum", [op("Mul", [mixing, mask], "k"), last], "1", keepdims=1)
            mixed = op("Mul", [out, share], "H")
            routed = mixed if routed is None else op("Add", [routed, mixed], "H")
        assert routed is not None
        y = op("Add", [y, routed], "H")
    y = op("MatMul", [y, head], "V")
    y.name = "y"
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="unrolled"
    )
    model = ir.Model(graph, ir_version=10)
    for number, node in enumerate(graph):
        node.name = f"node_{number}"
        for position, value in enumerate(node.outputs):
            value.name = value.name or f"v_{number}_{position}"
    return model
