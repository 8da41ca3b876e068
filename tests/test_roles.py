"""Roles found in real exporters' models and in small graphs, one question each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.roles import Role, find_roles, operators

MODELS = Path(__file__).parent / "models"
H, I, E, V = 8, 16, 4, 32  # noqa: E741 - hidden, intermediate, experts, vocabulary


# Real models: the number of nodes of each role in each layer.

EDGES = Counter({("embedding", None): 1, ("lm_head", None): 1})
PACKED = {"attention.qkv": 1, "attention.o": 1}
SEPARATE = {"attention.q": 1, "attention.k": 1, "attention.v": 1, "attention.o": 1}
FUSED = {"router": 1, "expert": 1}
MLP = {"mlp.gate": 1, "mlp.up": 1, "mlp.down": 1}
SHARED = {"shared_expert.gate": 1, "shared_expert.up": 1, "shared_expert.down": 1}
UNROLLED = {"router": 1, "expert.gate_up": 4, "expert.down": 4}
UNROLLED_APART = {"router": 1, "expert.gate": 4, "expert.up": 4, "expert.down": 4}
GATHERED = {"router": 1, "expert.gate_up": 2, "expert.down": 2}  # the Gather and the MatMul
BATCHED = {"router": 1, "expert.gate_up": 1, "expert.down": 1}

TWO_LAYERS = [
    (PACKED | FUSED | SHARED, "genai/gemma4_moe_fp32_cpu_b32"),
    (PACKED | GATHERED, "genai/gpt_oss_decomposed_dml_fp32"),
    (
        PACKED | FUSED,
        "genai/gpt_oss_fp16_cuda",
        "genai/gpt_oss_fp32_cpu",
        "genai/gpt_oss_int4_cpu_b32",
        "genai_old/phimoe_int4_cuda_071",
        "hf_exporter/qwen3_moe__ortcuda",
    ),
    (
        PACKED | MLP,
        "genai/llama_tied_fp16_cuda",
        "genai/llama_tied_fp32_cpu",
        "genai/llama_tied_int4_cpu_shared",
        "genai/llama_tied_int4_cpu_shared_kquant",
        "genai/llama_untied_int4_cpu",
    ),
    (SEPARATE | UNROLLED, "hf_exporter/gpt_oss__default", "hf_exporter/qwen3_moe__default"),
    (SEPARATE | GATHERED, "hf_exporter/mixtral__batched_mm"),
    (
        SEPARATE | FUSED | SHARED,
        "mobius/gemma4_fused_moe_head_f32",
        "mobius/gemma4_fused_moe_pre324_malformed_f32",
    ),
    (
        SEPARATE | UNROLLED | SHARED,
        "mobius/gemma4_silu_static_unroll_pr324_f32",
        "mobius/gemma4_static_unroll_ortq4",
        "mobius/gemma4_static_unroll_pr324_f16",
    ),
    (
        SEPARATE | UNROLLED | {"shared_expert.gate_up": 1, "shared_expert.down": 1},
        "mobius/granitemoehybrid_static_unroll_f32",
    ),
    (SEPARATE | MLP, "mobius/llama_tied_dense_f32"),
    (
        SEPARATE | UNROLLED_APART,
        "mobius/mixtral_dense_experts_f32",
        "mobius/qwen3_moe_dense_experts_f32",
        "mobius/qwen3_moe_dense_ortq4",
    ),
    (SEPARATE | FUSED, "mobius/qwen3_moe_qmoe_gptq4_asym"),
]
ONE_BLOCK = [
    (GATHERED, "hf_blocks/gpt_oss__batched_mm__dynamo18", "hf_blocks/mixtral__batched_mm__dynamo18"),
    (GATHERED, "torch_unroll/dynamic_gather_topk__dynamo18_opt"),
    ({"router": 1, "expert.gate_up": 8, "expert.down": 8}, "hf_blocks/qwen3_moe__eager__ts17"),
    (BATCHED, "optimum/qwen3vlmoe_block457__ts17", "torch_unroll/dense_bmm_all_experts__dynamo18_opt"),
    (
        UNROLLED,
        "torch_unroll/bmm_slice_transpose__dynamo18_opt",
        "torch_unroll/getitem_linear__dynamo18_opt",
        "torch_unroll/getitem_linear__dynamo18_raw",
        "torch_unroll/getitem_linear__ts17_nofold",
        "torch_unroll/getitem_linear_onehot__dynamo18_opt",
        "torch_unroll/getitem_matmul_T__dynamo18_opt",
        "torch_unroll/getitem_matmul_T__dynamo18_opt_f16",
        "torch_unroll/getitem_matmul_inmajor__dynamo18_opt",
        "torch_unroll/gptoss_getitem_bias_interleaved__dynamo18_opt",
        "torch_unroll/index_select_squeeze_linear__dynamo18_opt",
        "torch_unroll/slice_squeeze_linear__dynamo18_opt",
        "torch_unroll/slice_squeeze_linear__dynamo18_raw",
        "torch_unroll/split_squeeze_linear__dynamo18_opt",
        "torch_unroll/split_squeeze_linear__ts17_nofold",
    ),
    (
        UNROLLED_APART,
        "torch_unroll/modulelist_linear_rank2__dynamo18_opt",
        "torch_unroll/w1_w2_w3_getitem_linear__dynamo18_opt",
    ),
]


def _layered(*layers: dict[str, int]) -> Counter[tuple[str, int | None]]:
    return Counter({(name, index): count for index, layer in enumerate(layers) for name, count in layer.items()})


EXPECTED = (
    {model: _layered(roles, roles) + EDGES for roles, *ms in TWO_LAYERS for model in ms}
    | {model: _layered(roles) for roles, *models in ONE_BLOCK for model in models}
    | {
        # Layer 0 mixes by a convolution, whose projections have no role.
        "genai/lfm2_moe_fp32_cpu": _layered(FUSED, FUSED | PACKED) + EDGES
    }
)
PRESENT = [model for model in sorted(EXPECTED) if (MODELS / f"{model}.onnx").exists()]


def _load(model: str) -> ir.Model:
    return ir.load(MODELS / f"{model}.onnx")


def _histogram(model: ir.Model) -> Counter[tuple[str, int | None]]:
    return Counter((role.name, role.layer) for role in find_roles(model).values())


def test_models_are_there():
    assert len(EXPECTED) == 49
    assert len(PRESENT) >= 8


@pytest.mark.parametrize("name", PRESENT)
def test_real_model(name):
    assert _histogram(_load(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", PRESENT)
def test_static_experts_are_counted_from_zero(name):
    experts: dict[tuple[str, int | None], list[int]] = {}
    for role in find_roles(_load(name)).values():
        if role.expert is not None:
            experts.setdefault((role.name, role.layer), []).append(role.expert)
    counts = EXPECTED[name]
    static = counts.get(("expert.down", 0)) == 4 and "eager" not in name
    assert bool(experts) == static
    for key, indices in experts.items():
        assert sorted(indices) == list(range(counts[key]))


@pytest.mark.parametrize("name", PRESENT)
def test_names_do_not_matter(name):
    model = _load(name)
    before = list(find_roles(model).values())
    values = {}
    for node in model.graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                values[value] = None
        node.name = f"n{len(values)}"
    for index, value in enumerate(values):
        value.name = f"v{index}"
    assert list(find_roles(model).values()) == before


@pytest.mark.parametrize("name", PRESENT)
def test_nothing_is_changed(name):
    model = _load(name)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    find_roles(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# Small graphs.


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


def _logits(b: Build, x: ir.Value) -> ir.Value:
    logits = b.linear("head", x, V)
    logits.shape, logits.dtype = ir.Shape(["t", V]), ir.DataType.FLOAT
    return logits


def test_decoder_layers():
    b = Build()
    h = b.op("Gather", b.weight(V, H), b.ids)
    for layer in range(3):
        h = b.op("Add", h, b.attention(f"a{layer}", b.norm(h)))
        h = b.op("Add", h, b.mlp(f"m{layer}", b.norm(h)) if layer == 0 else b.experts(b.norm(h), f"e{layer}."))
    roles = b.roles(_logits(b, b.norm(h)))
    for layer in range(3):
        assert [roles[f"a{layer}.{x}"] for x in "qkvo"] == [Role(f"attention.{x}", layer) for x in "qkvo"]
    assert [roles[f"m0.{x}"] for x in "gud"] == [Role(f"mlp.{x}", 0) for x in ("gate", "up", "down")]
    assert roles["e1..r"] == Role("router", 1)
    assert [roles[f"e2.3.{x}"] for x in "gud"] == [Role(f"expert.{x}", 2, 3) for x in ("gate", "up", "down")]
    assert roles["head"] == Role("lm_head")


def test_feed_forward_without_attention_opens_layers():
    b = Build()
    h = b.op("Add", b.x, b.experts(b.x, "a"))
    h = b.op("Add", h, b.experts(b.norm(h), "b"))
    roles = b.roles(b.op("Add", h, b.attention("c", h)))
    assert (roles["a.r"].layer, roles["b.r"].layer, roles["c.q"].layer) == (0, 1, 2)


def test_parallel_attention_and_mlp_share_a_layer():
    b = Build()
    h = b.x
    for layer in range(2):
        x = b.norm(h)
        h = b.op("Add", h, b.op("Add", b.mlp(f"m{layer}", x), b.attention(f"a{layer}", x)))
    roles = b.roles(h)
    assert [roles[key].layer for key in ("m0.d", "a0.o", "m1.d", "a1.o")] == [0, 0, 1, 1]
    assert roles["m1.g"].name == "mlp.gate"


def test_cross_attention_stays_in_its_layer():
    b = Build()
    h, encoded = b.x, b.input(ir.DataType.FLOAT)
    for layer in range(2):
        h = b.op("Add", h, b.attention(f"s{layer}", h))
        k, v = b.linear(f"k{layer}", encoded, H), b.linear(f"v{layer}", encoded, H)
        y = b.op("MultiHeadAttention", b.linear(f"q{layer}", h, H), k, v, domain="com.microsoft")
        h = b.op("Add", h, b.linear(f"o{layer}", y, H))
        h = b.op("Add", h, b.mlp(f"m{layer}", h))
    roles = b.roles(h)
    assert roles["k1"] == Role("attention.k", 1)
    assert [roles[key].layer for key in ("s0.q", "q0", "o0", "m0.d", "s1.q", "o1", "m1.d")] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_shared_expert(gated, first):
    b = Build()
    h = b.op("Add", b.x, b.attention("a", b.x))
    x = b.norm(h)
    shared = b.mlp("s", x)
    if gated:
        shared = b.op("Mul", b.op("Sigmoid", b.linear("sr", x, 1)), shared)
    routed = b.experts(x)
    total = b.op("Add", b.op("Add", h, shared), routed) if first else b.op("Add", h, b.op("Add", routed, shared))
    roles = b.roles(total)
    assert [roles[f"s.{x}"] for x in "gud"] == [Role(f"shared_expert.{x}", 0) for x in ("gate", "up", "down")]
    assert roles.get("sr") == (Role("shared_expert.router", 0) if gated else None)
    assert roles["e0.d"] == Role("expert.down", 0, 0)


def test_gated_add_of_a_shared_expert():
    b = Build()
    gate = b.op("Sigmoid", b.linear("sr", b.x, 1))
    names = b.names(b.op("GatedAdd", b.experts(b.x), b.mlp("s", b.x), gate, domain="com.microsoft"))
    assert (names["s.u"], names["sr"], names["e1.u"]) == ("shared_expert.up", "shared_expert.router", "expert.up")


def test_dense_layer_beside_routed_layers_is_no_shared_expert():
    b = Build()
    h = b.op("Add", b.x, b.mlp("m", b.norm(b.x)))
    assert b.names(b.op("Add", h, b.experts(b.norm(h))))["m.d"] == "mlp.down"


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "Tanh"])
def test_ungated_mlp(activation):
    b = Build()
    inner = b.op(activation, b.linear("u", b.x, I))
    assert b.names(b.op("Add", b.x, b.linear("d", inner, H, I))) == {"u": "mlp.up", "d": "mlp.down"}


def test_packed_mlp_and_erf_gelu():
    b = Build()
    gate, up = b.op("Split", b.linear("gu", b.x, 2 * I), outputs=2, axis=-1, num_outputs=2)
    half = b.op("Mul", gate, b.constant(0.5, np.float32))
    inner = b.op("Mul", half, b.op("Add", b.op("Erf", gate), b.constant(1.0, np.float32)))
    names = b.names(b.op("Add", b.x, b.linear("d", b.op("Mul", up, inner), H, I)))
    assert names == {"gu": "mlp.gate_up", "d": "mlp.down"}


def test_decomposed_attention_with_rotary_and_cache():
    b = Build()
    h = b.op("Gather", b.weight(V, H), b.ids)
    positions = b.op("Range", b.constant(0), b.op("Shape", b.ids), b.constant(1))
    cos, sin = (b.op("Gather", b.weight(64, H), positions) for _ in range(2))
    x = b.norm(h)
    heads = []
    for letter in "qk":
        y = b.norm(b.op("Reshape", b.linear(letter, x, H), b.constant([0, 0, 2, 4])))
        low, high = b.op("Split", y, outputs=2, axis=-1, num_outputs=2)
        turned = b.op("Concat", b.op("Neg", high), low, axis=-1)
        heads.append(b.op("Add", b.op("Mul", y, cos), b.op("Mul", turned, sin)))
    past = b.input(ir.DataType.FLOAT)
    key = b.op("Concat", past, heads[1], axis=1)
    scores = b.op("MatMul", heads[0], b.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = b.op("Softmax", b.op("Add", b.op("Tanh", scores), b.input(ir.DataType.FLOAT)))
    mixed = b.op("MatMul", scores, b.linear("v", x, H))
    h = b.op("Add", h, b.linear("o", b.op("Reshape", mixed, b.constant([0, -1, H])), H))
    model = b.model(h, key)
    roles = find_roles(model)
    assert {label: roles[node].name for label, node in b.labels.items()} == {x: f"attention.{x}" for x in "qkvo"}
    assert [role.name for node, role in roles.items() if node.op_type == "Gather"] == ["embedding"]


def test_low_rank_projections_are_attention():
    b = Build()
    q = b.linear("q_b", b.norm(b.linear("q_a", b.x, 4)), H, 4)
    latent = b.linear("kv_a", b.x, 6)
    content, rope = b.op("Split", latent, outputs=2, axis=-1, num_outputs=2)
    k, v = b.op("Split", b.linear("kv_b", b.norm(content), 2 * H, 3), outputs=2, axis=-1, num_outputs=2)
    y = b.op("Attention", q, b.op("Concat", k, rope, axis=-1), v)
    names = b.names(b.op("Add", b.x, b.linear("o", y, H)))
    assert names == {
        "q_a": "attention.q",
        "q_b": "attention.q",
        "kv_a": "attention.k",
        "kv_b": "attention.kv",
        "o": "attention.o",
    }


def test_lora_adapters_take_the_role_of_what_they_adapt():
    b = Build()
    q = b.op("Add", b.linear("q", b.x, H), b.linear("B", b.linear("A", b.x, 2), H, 2))
    names = b.names(b.op("Attention", q, b.linear("k", b.x, H), b.linear("v", b.x, H)))
    assert names["A"] == names["B"] == names["q"] == "attention.q"


def test_gated_attention_output():
    b = Build()
    q, gate = b.op("Split", b.linear("q", b.x, 2 * H), outputs=2, axis=-1, num_outputs=2)
    y = b.op("Attention", q, b.linear("k", b.x, H), b.linear("v", b.x, H))
    names = b.names(b.op("Add", b.x, b.linear("o", b.op("Mul", y, b.op("Sigmoid", gate)), H)))
    assert names == {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.o"}


def test_layers_in_a_stack_are_no_experts():
    b = Build()
    stack = b.weight(2, H, I)
    h = b.x
    for layer in range(2):
        w = b.op("Gather", stack, b.constant(layer), axis=0)
        up = b.op("MatMul", h, w)
        b.labels[f"u{layer}"] = up.producer()
        h = b.op("Add", h, b.linear(f"d{layer}", b.op("Relu", up), H, I))
    assert b.roles(h)["u1"] == Role("mlp.up", 1)


def test_stacked_gate_and_up_are_no_experts():
    b = Build()
    stack = b.weight(2, H, I)
    gate, up = (b.op("MatMul", b.x, b.op("Gather", stack, b.constant(n), axis=0)) for n in range(2))
    b.labels |= {"g": gate.producer(), "u": up.producer()}
    down = b.linear("d", b.op("Mul", b.silu(gate), up), H, I)
    assert b.roles(b.op("Add", b.x, down)) == {
        "g": Role("mlp.gate", 0),
        "u": Role("mlp.up", 0),
        "d": Role("mlp.down", 0),
    }


def test_stacked_attention_projections_are_no_experts():
    b = Build()
    stack = b.weight(3, H, H)
    q, k, v = (b.op("MatMul", b.x, b.op("Gather", stack, b.constant(n), axis=0)) for n in range(3))
    b.labels["k"] = k.producer()
    assert b.roles(b.op("Attention", q, k, v))["k"] == Role("attention.k", 0)


def test_stack_alone_makes_experts():
    b = Build()
    stack, total = b.weight(3, H, H), None
    for expert in range(3):
        w = b.op("Squeeze", b.op("Slice", stack, *(b.constant([n]) for n in (expert, expert + 1, 0))), b.constant([0]))
        y = b.op("MatMul", b.x, w)
        b.labels[str(expert)] = y.producer()
        y = b.op("Unheard", y, domain="my")
        total = y if total is None else b.op("Add", total, y)
    assert b.roles(total)["2"] == Role("expert.gate_up", 0, 2)


def test_combine_by_where():
    b = Build()
    _, ids = b.route(b.x)
    mask = b.op("Equal", ids, b.constant(3))
    roles = b.roles(b.op("Where", mask, b.mlp("e", b.x), b.constant(0.0, np.float32)))
    assert roles["e.d"] == Role("expert.down", 0, 3)
    assert roles["e.g"] == Role("expert.gate", 0, 3)


def test_dispatch_and_combine_by_einsum():
    b = Build()
    _, ids = b.route(b.x)
    onehot = b.op("OneHot", ids, b.constant(E), b.constant([0, 1]))
    x = b.op("Einsum", onehot, b.x, equation="tke,th->eth")
    up = b.op("Einsum", x, b.weight(E, H, I), equation="eth,ehi->eti")
    b.labels["u"] = up.producer()
    down = b.op("Einsum", b.op("Relu", up), b.weight(E, I, H), equation="eti,eih->eth")
    b.labels["d"] = down.producer()
    names = b.names(b.op("Einsum", down, onehot, equation="eth,tke->th"))
    assert names == {"r": "router", "u": "expert.up", "d": "expert.down"}


def test_weights_applied_to_the_input():
    b = Build()
    weights, ids = b.route(b.x)
    x = b.op("Mul", b.x, b.expert_weight(weights, ids, 1))
    assert b.roles(b.mlp("e", x))["e.d"] == Role("expert.down", 0, 1)


def test_column_of_dense_weights_names_the_expert():
    b = Build()
    weights, ids = b.route(b.x)
    dense = b.op("ScatterElements", b.constant(np.zeros((3, E)), np.float32), ids, weights, axis=1)
    column = b.op("Gather", dense, b.constant([2]), axis=1)
    assert b.roles(b.op("Mul", b.mlp("e", b.x), column))["e.u"] == Role("expert.up", 0, 2)


def test_slot_of_the_top_k_names_no_expert():
    b = Build()
    weights, _ = b.route(b.x)
    slot = b.op("Gather", weights, b.constant([1]), axis=1)
    assert b.roles(b.op("Mul", b.mlp("e", b.x), slot))["e.u"] == Role("expert.up", 0, None)


def test_quantized_stack_gathered_at_run_time():
    b = Build()
    _, ids = b.route(b.x)
    codes = b.constant(np.zeros((E, I, H)), np.uint8)
    w = b.op("GatherBlockQuantized", codes, ids, b.weight(E, I, 1), domain="com.microsoft")
    b.labels["gather"] = w.producer()
    up = b.op("MatMul", w, b.op("Unsqueeze", b.x, b.constant([-1])))
    b.labels["u"] = up.producer()
    names = b.names(b.op("Add", b.x, b.linear("d", b.op("Relu", up), H, I)))
    assert names == {"r": "router", "gather": "expert.up", "u": "expert.up", "d": "expert.down"}


def test_three_dimensional_quantized_embedding():
    b = Build()
    codes = b.constant(np.zeros((V, 1, H)), np.uint8)
    h = b.op("GatherBlockQuantized", codes, b.ids, b.weight(V, 1, 1), domain="com.microsoft")
    b.labels["embed"] = h.producer()
    h = b.op("Reshape", h, b.constant([0, 0, H]))
    assert b.names(b.op("Add", h, b.mlp("m", b.norm(h))))["embed"] == "embedding"


def test_second_table_of_the_same_ids_is_an_embedding():
    b = Build()
    h, extra = (b.op("Gather", b.weight(V, H), b.ids) for _ in range(2))
    b.labels["extra"] = extra.producer()
    h = b.op("Add", h, b.mlp("m", h))
    gated = b.op("Mul", b.op("Gelu", b.linear("gate", h, H)), extra)
    roles = b.roles(b.op("Add", h, b.linear("project", gated, H)))
    assert roles["extra"] == Role("embedding")
    assert "gate" not in roles
    assert "project" not in roles


def test_sampling_from_the_logits_makes_no_router():
    b = Build()
    h = b.op("Gather", b.weight(V, H), b.ids)
    h = b.op("Add", h, b.mlp("m", h))
    logits = _logits(b, h)
    _, token = b.op("TopK", logits, b.constant([1]), outputs=2)
    assert b.names(logits, token)["head"] == "lm_head"


def test_router_logits_as_graph_output():
    b = Build()
    h = b.op("Add", b.x, b.experts(b.x))
    scores = b.labels["e.r"].outputs[0]
    scores.shape, scores.dtype = ir.Shape(["t", E]), ir.DataType.FLOAT
    names = b.names(_logits(b, h), scores)
    assert (names["e.r"], names["head"]) == ("router", "lm_head")


def test_softcapped_head_and_narrow_head():
    b = Build()
    capped = b.op("Mul", b.op("Tanh", b.linear("head", b.x, V)), b.constant(30.0, np.float32))
    capped.shape, capped.dtype = ir.Shape(["t", V]), ir.DataType.FLOAT
    assert b.names(capped) == {"head": "lm_head"}
    b = Build()
    narrow = b.linear("classes", b.x, 2)
    narrow.shape, narrow.dtype = ir.Shape(["t", 2]), ir.DataType.FLOAT
    assert b.names(narrow) == {}


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
    logits = _logits(body, h)
    y = b.op("BeamSearch", b.x, domain="com.microsoft", decoder=body.graph(logits))
    roles = find_roles(b.model(y))
    assert roles[body.labels["head"]] == Role("lm_head")
    assert roles[body.labels["a.k"]] == Role("attention.k", 0)


# Nothing raises.


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
