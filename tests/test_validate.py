"""Structural validity: each defect is named in one line, and nothing that runs is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node

from rewriter.errors import ModelError
from rewriter.io.validate import describe, validate

MODELS = Path(__file__).parent / "models"
INVALID = {"gemma4_fused_moe_pre324_malformed_f32", "gpt_oss_decomposed_dml_fp32"}


def model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("y",),
    functions: list[onnx.FunctionProto] | None = None,
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.BOOL if n == "p" else TensorProto.FLOAT, None) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    return ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=imports, functions=functions or []))


def branches(then: list[onnx.NodeProto], other: list[onnx.NodeProto]) -> onnx.NodeProto:
    def body(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [result])

    return make_node("If", ["p"], ["y"], name="if", then_branch=body("t", then), else_branch=body("e", other))


def refused(broken: ir.Model, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        validate(broken)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("path", sorted(MODELS.rglob("*.onnx")), ids=lambda p: p.stem)
def test_real_models(path: Path) -> None:
    real = ir.load(path)
    before = ir.to_proto(real).SerializeToString()
    if path.stem in INVALID:
        refused(real)
    else:
        validate(real)
    assert ir.to_proto(real).SerializeToString() == before


def test_dangling_values() -> None:
    refused(model([make_node("Add", ["x", "gone"], ["y"], name="n")]), "node 'n' (Add)", "'gone'")
    refused(model([make_node("Neg", ["x"], ["z"])]), "output 'y' of the graph")
    sibling = [make_node("Neg", ["x"], ["inner"]), make_node("Neg", ["inner"], ["a"])]
    refused(model([branches(sibling, [make_node("Neg", ["inner"], ["b"])])], inputs=("x", "p")), "'inner'", "scope")
    validate(model([branches(sibling, [make_node("Neg", ["x"], ["b"])])], inputs=("x", "p")))


def test_names_defined_twice() -> None:
    twice = model([make_node("Neg", ["x"], ["a"]), make_node("Neg", ["a"], ["y"])])
    twice.graph[0].outputs[0].name = "y"
    refused(twice, "'y'", "second time")
    refused(model([make_node("Neg", ["x"], ["y"])], inputs=("x", "x")), "an input", "'x'")
    validate(model([make_node("Neg", ["x"], ["y"])], {"x": np.zeros(2, np.float32)}))


def test_initializer_without_data() -> None:
    empty = model([make_node("Add", ["x", "w"], ["y"])], {"w": np.zeros(2, np.float32)})
    empty.graph.initializers["w"].const_value = None
    refused(empty, "'w'", "has no data")


def test_cycles_and_order() -> None:
    cycle = [
        make_node("Add", ["x", "c"], ["a"], name="first"),
        make_node("Neg", ["a"], ["b"]),
        make_node("Neg", ["b"], ["c"]),
        make_node("Neg", ["c"], ["y"], name="behind"),
    ]
    refused(model(cycle), "its own output")
    with pytest.raises(ModelError) as caught:
        validate(model(cycle))
    assert "behind" not in str(caught.value)
    unsorted = model([make_node("Neg", ["a"], ["y"]), make_node("Neg", ["x"], ["a"])])
    assert validate(unsorted) == [unsorted.graph]
    unsorted.graph.sort()
    assert not validate(unsorted)
    later = [
        branches([make_node("Neg", ["a"], ["t"])], [make_node("Neg", ["x"], ["e"])]),
        make_node("Neg", ["x"], ["a"]),
    ]
    captured = model(later, inputs=("x", "p"))
    assert validate(captured) == [captured.graph]


def test_functions_are_checked_and_replace_operators() -> None:
    def function(nodes: list[onnx.NodeProto], domain: str, name: str) -> onnx.FunctionProto:
        return helper.make_function(domain, name, ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])

    call = [make_node("F", ["x"], ["y"], domain="own")]
    validate(model(call, functions=[function([make_node("Neg", ["a"], ["b"])], "own", "F")]))
    broken = function([make_node("Add", ["a", "gone"], ["b"])], "own", "F")
    refused(model(call, functions=[broken]), "'gone'")
    loop = function([make_node("Neg", ["c"], ["b"]), make_node("Neg", ["b"], ["c"])], "own", "F")
    refused(model(call, functions=[loop]), "its own output")
    mine = function([make_node("Neg", ["a"], ["b"])], "com.microsoft", "MoE")
    validate(model([make_node("MoE", ["x"], ["y"], domain="com.microsoft")], functions=[mine]))


def test_attributes_have_their_types() -> None:
    gemm = make_node("Gemm", ["x", "w"], ["y"], transB="a")
    refused(model([gemm], {"w": np.ones((2, 2), np.float32)}), "transB is of type STRING", "takes INT")
    own = make_node("Mine", ["x"], ["y"], axis="a")
    validate(model([own]))


def test_arity() -> None:
    refused(model([make_node("MatMul", ["x"], ["y"], name="n")]), "required input 1 (B) is missing")
    refused(model([make_node("Clip", ["", "x"], ["y"])]), "required input 0 (input)")
    validate(model([make_node("Clip", ["x", "", "x"], ["y"])]))
    refused(model([make_node("Neg", ["x", "x"], ["y"])]), "2 inputs", "1 at most")
    validate(model([make_node("Neg", ["x", ""], ["y"])]))
    validate(model([make_node("SomethingOfTheirs", ["x", ""], ["y"])]))
    rotary = make_node("RotaryEmbedding", ["", "x", "x", "x"], ["y"], domain="com.microsoft")
    refused(model([rotary]), "required input 0 (input)")


def test_standard_operands() -> None:
    f = np.float32
    refused(model([make_node("MatMul", ["x", "w"], ["y"])], {"w": np.array(1, f)}), "'w'", "scalar")
    refused(
        model([make_node("MatMul", ["v", "w"], ["y"])], {"v": np.ones((2, 3), f), "w": np.ones((4, 5), f)}), "[2, 3]"
    )
    validate(model([make_node("MatMul", ["v", "w"], ["y"])], {"v": np.ones(4, f), "w": np.ones((2, 4, 5), f)}))
    refused(model([make_node("Gemm", ["x", "w"], ["y"])], {"w": np.ones((2, 3, 4), f)}), "rank 3", "Gemm takes rank 2")


def microsoft(op: str, shapes: dict[int, tuple[tuple[int, ...], type]], count: int, **attributes: object) -> ir.Model:
    names = ["x" if i < 2 else "" for i in range(count)]
    weights = {}
    for index, (shape, dtype) in shapes.items():
        names[index] = f"w{index}"
        weights[f"w{index}"] = np.zeros(shape, dtype)
    return model([make_node(op, names, ["y"], name="n", domain="com.microsoft", **attributes)], weights)


def test_moe() -> None:
    f = np.float32
    good = {2: ((4, 16, 8), f), 3: ((4, 16), f), 4: ((4, 8, 16), f), 5: ((4, 8), f)}
    validate(microsoft("MoE", good, 6))
    refused(microsoft("MoE", good | {3: ((4, 8, 16), f)}, 6), "input 3 (fc1_experts_bias)", "expected rank 2")
    refused(microsoft("MoE", good | {2: ((16, 8), f)}, 6), "input 2 (fc1_experts_weights)", "expected rank 3")
    refused(microsoft("MoE", good | {4: ((3, 8, 16), f)}, 6), "number of experts", "fc2_experts_weights 3")
    refused(microsoft("MoE", {2: good[2]}, 3), "required input 4 (fc2_experts_weights)")


def test_qmoe() -> None:
    f, u = np.float32, np.uint8
    good = {2: ((4, 16, 4), u), 3: ((4, 16, 1), f), 5: ((4, 8, 8), u), 6: ((4, 8, 1), f), 4: ((4, 16), f)}
    validate(microsoft("QMoE", good, 7))
    refused(microsoft("QMoE", good | {2: ((4, 16, 8), f)}, 7), "input 2 (fc1_experts_weights)", "packed integers")
    refused(microsoft("QMoE", good | {4: ((4, 16, 4), f)}, 7), "input 4 (fc1_experts_bias)")
    refused(microsoft("QMoE", good | {6: ((5, 8, 1), f)}, 7), "number of experts", "fc2_scales 5")
    refused(microsoft("QMoE", {k: v for k, v in good.items() if k < 5}, 5), "required input 5 (fc2_experts_weights)")


def test_matmul_nbits() -> None:
    f, u = np.float32, np.uint8
    sizes = {"K": 40, "N": 16, "bits": 4, "block_size": 32}
    good = {1: ((16, 2, 16), u), 2: ((16, 2), f)}
    validate(microsoft("MatMulNBits", good, 3, **sizes))
    validate(microsoft("MatMulNBits", good | {2: ((32,), f)}, 3, **sizes))
    refused(microsoft("MatMulNBits", good | {1: ((16, 1, 16), u)}, 3, **sizes), "input 1 (B)", "512 elements")
    refused(microsoft("MatMulNBits", good | {2: ((16, 1), f)}, 3, **sizes), "input 2 (scales)", "32 elements")
    refused(microsoft("MatMulNBits", good | {1: ((16, 2, 16), f)}, 3, **sizes), "expected UINT8")
    refused(microsoft("MatMulNBits", good, 3, K=40, N=16), "attribute block_size")
    refused(microsoft("MatMulNBits", good, 3, K=40, N=16, block_size=0), "must be positive")
    refused(microsoft("MatMulNBits", {1: good[1]}, 2, **sizes), "required input 2 (scales)")


def test_gather_block_quantized() -> None:
    f, u = np.float32, np.uint8
    good = {0: ((8, 16), u), 2: ((8, 1), f)}
    validate(microsoft("GatherBlockQuantized", good, 3))
    refused(microsoft("GatherBlockQuantized", good | {0: ((8, 16), f)}, 3), "input 0 (data)")
    refused(microsoft("GatherBlockQuantized", good | {2: ((8, 1, 1), f)}, 3), "rank 2", "rank 3")


def test_nodes_without_a_name_are_described_by_their_output() -> None:
    node = model([make_node("MoE", ["x"], ["y"], domain="com.microsoft")]).graph[0]
    node.name = None
    assert describe(node) == "node 'y' (com.microsoft::MoE)"


def test_a_negative_limit_never_reaches_the_runtime() -> None:
    weights = {"a": np.zeros((2, 8, 4), np.float32), "b": np.zeros((2, 4, 4), np.float32)}
    slots = ["x", "x", "a", "", "b"]

    def experts(limit: float) -> ir.Model:
        node = make_node("MoE", slots, ["y"], domain="com.microsoft", swiglu_limit=limit)
        return model([node], weights)

    refused(experts(-1.0), "swiglu_limit is -1", "abort")
    validate(experts(0.0))


def test_codes_have_scales_and_no_more_zero_points() -> None:
    arrays = {"c1": np.zeros((2, 8, 16), np.uint8), "s1": np.ones((2, 8, 2), np.float32)}
    arrays |= {"c2": np.zeros((2, 32, 4), np.uint8), "s2": np.ones((2, 32, 1), np.float32)}
    slots = ["x", "x", "c1", "s1", "", "c2", "s2"]

    def experts(*inputs: str, **attributes: str) -> ir.Model:
        node = make_node("QMoE", list(inputs), ["y"], domain="com.microsoft", block_size=16, **attributes)
        return model([node], arrays)

    validate(experts(*slots))
    refused(experts(*slots[:6]), "input 6 (fc2_scales) is missing")
    refused(experts(*slots[:3], "", *slots[4:]), "input 3 (fc1_scales) is missing")
    arrays["z1"] = np.zeros((2, 8, 1), np.uint8)
    validate(experts(*slots, "", "", "", "", "z1"))
    refused(
        experts(*slots[:2], "z1", *slots[3:], "", "", "", "", "c1"), "input 11 (fc1_zero_points) holds 'c1' of shape"
    )
    validate(experts(*slots[:3], "", *slots[4:6], quant_type="fp4"))
