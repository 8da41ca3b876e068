"""Small graphs: operators by call, weights by shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.roles import Role, find_roles

H, I, E, V = 8, 16, 4, 32  # noqa: E741 - hidden, intermediate, experts, vocabulary


class Build:
    """Writes a graph: operators by call, weights by shape; remembers linears by label."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.labels: dict[str, ir.Node] = {}
        self.x = self.input(ir.DataType.FLOAT)
        self.ids = self.input(ir.DataType.INT64)

    def input(self, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=f"in{id(self)}_{dtype}", type=ir.TensorType(dtype), shape=ir.Shape(["t", H]))

    def constant(self, array: object, dtype: type = np.int64) -> ir.Value:
        data = np.asarray(array, dtype)
        name = f"c{len(self.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(data, name=name), shape=ir.Shape(data.shape))
        value.dtype = ir.DataType.from_numpy(data.dtype)
        self.initializers.append(value)
        return value

    def weight(self, *shape: int) -> ir.Value:
        return self.constant(np.zeros(shape), np.float32)

    def op(self, op_type, *inputs, outputs=1, domain="", **attributes):
        node = ir.node(op_type, list(inputs), attributes=attributes, num_outputs=outputs, domain=domain)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def linear(self, label: str, x: ir.Value, n: int, k: int = H) -> ir.Value:
        output = self.op("MatMul", x, self.weight(k, n))
        self.labels[label] = output.producer()
        return output

    def silu(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def norm(self, x: ir.Value) -> ir.Value:
        mean = self.op("ReduceMean", self.op("Pow", x, self.constant(2.0, np.float32)), self.constant([-1]))
        scale = self.op("Reciprocal", self.op("Sqrt", self.op("Add", mean, self.constant(1e-6, np.float32))))
        return self.op("Mul", self.weight(H), self.op("Mul", x, scale))

    def mlp(self, label: str, x: ir.Value) -> ir.Value:
        gate, up = self.linear(f"{label}.g", x, I), self.linear(f"{label}.u", x, I)
        return self.linear(f"{label}.d", self.op("Mul", self.silu(gate), up), H, I)

    def attention(self, label: str, x: ir.Value) -> ir.Value:
        q, k, v = (self.linear(f"{label}.{letter}", x, H) for letter in "qkv")
        return self.linear(f"{label}.o", self.op("Attention", q, k, v), H)

    def route(self, x: ir.Value, label: str = "r") -> tuple[ir.Value, ir.Value]:
        scores = self.op("Softmax", self.linear(label, x, E))
        return self.op("TopK", scores, self.constant([2]), outputs=2)

    def expert_weight(self, weights: ir.Value, ids: ir.Value, expert: int) -> ir.Value:
        mask = self.op("Cast", self.op("Equal", ids, self.constant(expert)), to=1)
        return self.op("ReduceSum", self.op("Mul", weights, mask), self.constant([-1]), keepdims=1)

    def experts(self, x: ir.Value, label: str = "e") -> ir.Value:
        weights, ids = self.route(x, f"{label}.r")
        total = None
        for expert in range(E):
            y = self.op("Mul", self.mlp(f"{label}{expert}", x), self.expert_weight(weights, ids, expert))
            total = y if total is None else self.op("Add", total, y)
        assert total is not None
        return total

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        return ir.Graph(
            [self.x, self.ids],
            list(outputs),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": 23, "com.microsoft": 1},
        )

    def model(self, *outputs: ir.Value) -> ir.Model:
        return ir.Model(self.graph(*outputs), ir_version=10)

    def roles(self, *outputs: ir.Value) -> dict[str, Role]:
        roles = find_roles(self.model(*outputs))
        return {label: roles[node] for label, node in self.labels.items() if node in roles}

    def names(self, *outputs: ir.Value) -> dict[str, str]:
        return {label: role.name for label, role in self.roles(*outputs).items()}


def logits_of(b: Build, x: ir.Value) -> ir.Value:
    logits = b.linear("head", x, V)
    logits.shape, logits.dtype = ir.Shape(["t", V]), ir.DataType.FLOAT
    return logits
