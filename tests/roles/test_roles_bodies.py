"""Roles in bodies of control flow and in functions; nothing raises, whatever the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from role_graphs import Build, E, H, I, logits_of

from rewriter.roles import Role, find_roles, operators


def test_bodies_of_if():
    b = Build()
    _, ids = b.route(b.x)
    mask = b.op("Equal", ids, b.constant(1))
    body = Build()
    y = body.mlp("e", b.x)
    zeros = Build()
    branches = [
        ir.Graph([], [y], nodes=body.nodes, initializers=body.initializers),
        ir.Graph([], [zeros.op("Identity", b.x)], nodes=zeros.nodes),
    ]
    ran = b.op("If", b.op("ReduceMax", mask), then_branch=branches[0], else_branch=branches[1])
    roles = find_roles(b.model(b.op("Mul", ran, b.op("Cast", mask, to=1))))
    assert roles[body.labels["e.d"]] == Role("expert.down", 0, 1)


def test_loop_over_experts():
    b = Build()
    _, ids = b.route(b.x)
    stack = b.weight(E, H, I)
    body = Build()
    index, going, total = (ir.Value(name=name) for name in ("i", "go", "total"))
    up = body.op("MatMul", b.x, body.op("Gather", stack, index, axis=0))
    down = body.linear("d", body.op("Relu", up), H, I)
    mask = body.op("Cast", body.op("Equal", ids, index), to=1)
    summed = body.op("Add", total, body.op("Mul", down, mask))
    inner = ir.Graph(
        [index, going, total],
        [body.op("Identity", going), summed],
        nodes=body.nodes,
        initializers=body.initializers,
    )
    y = b.op("Loop", b.constant(E), None, b.constant(np.zeros((3, H)), np.float32), body=inner)
    roles = find_roles(b.model(b.op("Add", b.x, y)))
    assert roles[up.producer()] == Role("expert.up", 0)
    assert roles[body.labels["d"]] == Role("expert.down", 0)


def test_function_bodies_have_roles_but_no_layer():
    b = Build()
    y = b.op("Add", b.x, b.mlp("m", b.x))
    weights = {value: b.op("Constant", value=value.const_value) for value in b.initializers}
    for node in b.nodes:
        for index, value in enumerate(node.inputs):
            if value in weights:
                node.replace_input_with(index, weights[value])
    constants = [value.producer() for value in weights.values()]
    graph = ir.Graph([b.x], [y], nodes=constants + [n for n in b.nodes if n not in constants], opset_imports={"": 23})
    function = ir.Function("my", "block", graph=graph, attributes=[])
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    call = ir.node("block", [x], domain="my")
    main = ir.Graph([x], call.outputs, nodes=[call], opset_imports={"": 23, "my": 1})
    roles = find_roles(ir.Model(main, ir_version=10, functions=[function]))
    assert {label: roles[node] for label, node in b.labels.items()} == {
        "m.g": Role("mlp.gate"),
        "m.u": Role("mlp.up"),
        "m.d": Role("mlp.down"),
    }


def test_decoder_inside_an_unknown_operator():
    b, body = Build(), Build()
    h = body.op("Add", body.x, body.attention("a", body.x))
    logits = logits_of(body, h)
    y = b.op("BeamSearch", b.x, domain="com.microsoft", decoder=body.graph(logits))
    roles = find_roles(b.model(y))
    assert roles[body.labels["head"]] == Role("lm_head")
    assert roles[body.labels["a.k"]] == Role("attention.k", 0)


def test_long_chains():
    b = Build()
    weights, _ = b.route(b.x)
    h, total = b.x, b.linear("first", b.x, H)
    for _ in range(5000):
        h = b.op("Add", h, b.linear("", b.x, H))
        total = b.op("Add", total, b.linear("last", b.x, H))
    roles = find_roles(b.model(b.op("Add", h, b.op("Mul", total, weights))))
    assert len(roles) == 5002
    assert roles[b.labels["first"]].name == roles[b.labels["last"]].name == "expert.down"


def test_deep_nesting():
    b = Build()
    value = b.linear("d", b.op("Relu", b.linear("u", b.x, I)), H, I)
    nodes, initializers = b.nodes, b.initializers
    for _ in range(300):
        body = ir.Graph([], [value], nodes=nodes, initializers=initializers)
        node = ir.node("If", [b.ids], attributes={"then_branch": body})
        outer = ir.node("Identity", list(node.outputs))
        value, nodes, initializers = outer.outputs[0], [node, outer], []
    roles = find_roles(ir.Model(ir.Graph([b.x, b.ids], [value], nodes=nodes, opset_imports={"": 23}), ir_version=10))
    assert roles[b.labels["d"]] == Role("mlp.down", 0)


def test_missing_external_file():
    b = Build()
    tensor = ir.ExternalTensor("gone.bin", 0, 8, ir.DataType.INT64, shape=ir.Shape([1]), name="i", base_dir="/nowhere")
    index = ir.Value(name="i", const_value=tensor, shape=ir.Shape([1]))
    b.initializers.append(index)
    y = b.op("MatMul", b.x, b.op("Gather", b.weight(E, H, H), index, axis=0))
    find_roles(b.model(y))


EVERY_OPERATOR = sorted(
    {"GatedAdd", "Constant", "Unheard", "Loop", "If", "Scan"}.union(
        *(table for table in vars(operators).values() if isinstance(table, frozenset))
    )
)


@st.composite
def _random_models(draw):
    b = Build()
    values: list[ir.Value | None] = [None, b.x, b.ids, ir.Value(name="untyped")]
    values += [b.weight(E, H, H), b.weight(H, H), b.constant(1), b.constant([0, 1]), b.constant(np.zeros((E, 2, 2)))]
    for _ in range(draw(st.integers(1, 40))):
        op_type = draw(st.sampled_from(EVERY_OPERATOR))
        inputs = draw(st.lists(st.sampled_from(values), max_size=5))
        attributes = draw(
            st.dictionaries(
                st.sampled_from(["axis", "to", "num_scan_inputs", "starts", "ends", "value_int", "value_ints"]),
                st.one_of(st.integers(-3, 3), st.lists(st.integers(-3, 3), min_size=1, max_size=3)),
                max_size=2,
            )
        )
        if draw(st.integers(0, 9)) == 0 and b.nodes:
            inner = ir.Value(name="inner")
            body = ir.node(draw(st.sampled_from(EVERY_OPERATOR)), [inner, draw(st.sampled_from(values))])
            attributes["body"] = ir.Graph([inner], body.outputs, nodes=[body])
        node = ir.node(op_type, inputs, attributes=attributes, num_outputs=draw(st.integers(1, 4)))
        b.nodes.append(node)
        values.extend(node.outputs)
    outputs = draw(st.lists(st.sampled_from([value for value in values if value is not None]), min_size=1, max_size=3))
    return b.model(*outputs)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(_random_models())
def test_random_graphs_never_raise(model):
    nodes = set(model.graph.all_nodes())
    for node, role in find_roles(model).items():
        assert node in nodes
        assert role.name
        assert role.layer is None or role.layer >= 0
