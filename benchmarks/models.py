"""Models of any size: unrolled Mixture-of-Experts layers, spelled as mobius writes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape


def unrolled_model(
    layers: int, experts: int, *, hidden: int = 32, intermediate: int = 16, top_k: int = 2, seed: int = 0
) -> ir.Model:
    """Returns ``layers`` unrolled SwiGLU MoE layers with residuals; x [T, H] float32 in, y [T, H] out.

    Nine nodes of every expert move weights or multiply, nine more mix its output in: 69,000 nodes at 30 x 128.
    """
    generator = np.random.default_rng(seed)
    tape = Tape()

    def weight(name: str, *shape: int) -> ir.Value:
        values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        return tape.initializer(ir.tensor(values, name=name))

    def integers(name: str, *values: int) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(values, dtype=np.int64), name=name))

    index = [integers(f"index_{e}", e) for e in range(experts)]
    scalar = [tape.initializer(ir.tensor(np.int64(e), name=f"expert_{e}")) for e in range(experts)]
    k, last = integers("k", top_k), integers("last_axis", -1)
    x = ir.val("x", ir.DataType.FLOAT, ["T", hidden])
    typed = {"H": ["T", hidden], "I": ["T", intermediate], "2I": ["T", 2 * intermediate]}

    def op(op_type: str, inputs: list[ir.Value], shape: str = "", **attributes: object) -> ir.Value:
        out = tape.op(op_type, inputs, attributes or None)
        if shape:
            out.dtype, out.shape = ir.DataType.FLOAT, ir.Shape(typed[shape])
        return out

    def slice_of(stack: ir.Value, expert: int) -> ir.Value:
        gathered = op("Gather", [stack, index[expert]], axis=0)
        return op("Transpose", [op("Squeeze", [gathered, index[0]])])

    y = x
    for layer in range(layers):
        prefix = f"layers.{layer}"
        router = weight(f"{prefix}.router.weight", hidden, experts)
        gate_up = weight(f"{prefix}.experts.gate_up.weight", experts, 2 * intermediate, hidden)
        down = weight(f"{prefix}.experts.down.weight", experts, hidden, intermediate)
        logits = tape.op("MatMul", [y, router])
        values, chosen = tape.op_multi_out("TopK", [logits, k], {"axis": -1}, num_outputs=2)
        mixing = op("Softmax", [values], axis=-1)
        routed: ir.Value | None = None
        for e in range(experts):
            both = op("MatMul", [y, slice_of(gate_up, e)], "2I")
            gate, up = tape.op_multi_out("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
            for part in (gate, up):
                part.dtype, part.shape = ir.DataType.FLOAT, ir.Shape(typed["I"])
            silu = op("Mul", [gate, op("Sigmoid", [gate], "I")], "I")
            out = op("MatMul", [op("Mul", [silu, up], "I"), slice_of(down, e)], "H")
            mask = tape.op("Cast", [op("Equal", [chosen, scalar[e]])], {"to": int(ir.DataType.FLOAT)})
            share = op("ReduceSum", [op("Mul", [mixing, mask]), last], keepdims=1)
            mixed = op("Mul", [out, share], "H")
            routed = mixed if routed is None else op("Add", [routed, mixed], "H")
        assert routed is not None
        y = op("Add", [y, routed], "H")
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
