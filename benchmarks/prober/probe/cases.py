"""A model of one operator for a form, with inputs and what must come out.

Inputs and outputs of the model are float32 and are cast beside the operator, so that feeding it needs no other types; a
Gather on either side makes the operator's x and y values inside of the model, whose memory a runtime may share.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from probe import codes, experts
from probe.forms import Form, LinearForm, LookupForm, MoEForm, QMoEForm, text_of

TOKENS = (1, 7, 300)
_ROWS = 50


@dataclass(frozen=True)
class Case:
    """A model and its runs.

    Attributes:
        model: the serialized model.
        run: tokens -> inputs and the expected output; asked only of what a runtime loads.
    """

    model: bytes
    run: Callable[[int], tuple[dict[str, np.ndarray], np.ndarray]]


class _Graph:
    """Collects a node's inputs and the initializers among them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: list = []

    def value(self, name: str) -> None:
        self.names.append(name)

    def tensor(self, array: np.ndarray | None, dtype: str = "UINT8", raw: bytes | None = None) -> None:
        """Appends a constant; None leaves the slot empty."""
        if array is None:
            self.names.append("")
            return
        name = f"t{len(self.names)}"
        data = array.astype(np.uint8).tobytes() if raw is None and dtype == "UINT8" else raw
        data = codes.stored(array, dtype) if data is None else data
        self.tensors.append(helper.make_tensor(name, getattr(TensorProto, dtype), array.shape, data, raw=True))
        self.names.append(name)

    def inputs(self) -> list[str]:
        while self.names and not self.names[-1]:
            self.names.pop()
        return self.names


def case_of(form: Form, attributes: Collection[str]) -> Case:
    """Makes the case of a form.

    Args:
        form: the form.
        attributes: what the runtime's operator has: an attribute that may be left out is, where it has not.
    """
    rng = np.random.default_rng(_seed(form))
    if isinstance(form, MoEForm):
        return _experts(form, rng, attributes)
    return _lookup(form, rng) if isinstance(form, LookupForm) else _linear(form, rng)


def _seed(form: Form) -> int:
    return zlib.crc32(text_of(form).encode())


def _linear(form: LinearForm, rng: np.random.Generator) -> Case:
    weight = codes.integers(rng, (form.n, form.k), form.bits, form.block, form.zeros, form.x, signed=True)
    blocks = weight.scales.shape[-1]
    graph = _Graph()
    graph.value("x")
    padded = np.pad(weight.codes, [(0, 0), (0, blocks * form.block - form.k)])
    laid = padded if form.layout == "raw" else codes.cutlass(padded, form.bits, int(form.layout[2:]))
    b = codes.packed(laid.reshape(form.n, blocks, -1), form.bits) if form.layout == "raw" else laid
    graph.tensor(b.reshape(form.n, blocks, -1))
    graph.tensor(weight.scales.reshape(-1) if form.flat else weight.scales, form.x)
    if weight.zeros is not None and form.zeros == "float":
        graph.tensor(weight.zeros, form.x)
    elif weight.zeros is not None:
        graph.tensor(codes.packed(weight.zeros.astype(np.uint8), form.bits))
    bias = codes.rounded(rng.standard_normal(form.n), form.x) if form.bias else None
    if bias is not None:
        for _ in range(5 - len(graph.names)):
            graph.tensor(None)
        graph.tensor(bias, form.x)
    settings: dict[str, object] = {"K": form.k, "N": form.n, "bits": form.bits, "block_size": form.block}
    if form.layout != "raw":
        settings["weight_prepacked"] = {"sm80": 1, "sm90": 2}[form.layout]
    if form.level:
        settings["accuracy_level"] = form.level

    def run(tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        x = codes.rounded(rng.standard_normal((tokens, form.k)) + 0.25, form.x)
        y = x.astype(np.float64) @ weight.value.T + (0 if bias is None else bias)
        return {"x_fed": x, "rows": np.arange(tokens, dtype=np.int32)}, y

    return Case(_model(form, graph, settings, {"x": ["T", form.k]}), run)


def _lookup(form: LookupForm, rng: np.random.Generator) -> Case:
    lead = (_ROWS,) if form.rank == 2 else (6, _ROWS)
    weight = codes.integers(rng, (*lead, form.k), form.bits, form.block, form.zeros, form.x, signed=True)
    graph = _Graph()
    graph.tensor(codes.packed(weight.codes, form.bits))
    graph.value("rows")
    graph.tensor(weight.scales, form.x)
    if weight.zeros is not None:
        graph.tensor(codes.packed(weight.zeros.astype(np.uint8), form.bits))
    settings = {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": form.rank - 1}

    def run(tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = rng.integers(0, lead[0], tokens).astype(np.int32)
        return {"rows": rows}, weight.value[rows]

    return Case(_model(form, graph, settings, {}), run)


def _experts(form: MoEForm, rng: np.random.Generator, attributes: Collection[str]) -> Case:
    wide, count = experts.halves(form) * form.i, _count(form)
    shapes = [(count, wide, form.h), (count, form.h, form.i)]
    if form.fc3:
        shapes.append((count, form.i, form.h))
    biases = [codes.rounded(0.5 * rng.standard_normal(s[:2]), form.x) for s in shapes] if form.bias == "all" else None
    graph = _Graph()
    graph.value("x")
    graph.value("router")
    settings: dict[str, object] = {
        "k": form.top,
        "activation_type": form.act,
        "normalize_routing_weights": int(form.normalize),
    }
    if form.sparse:
        settings["use_sparse_mixer"] = 1
    if form.act in ("swiglu", "geglu"):
        settings["swiglu_fusion"] = form.fusion
    if form.act == "swiglu":
        alpha, beta, limit = map(float, form.constants.split(","))
        settings |= {"activation_alpha": alpha, "activation_beta": beta}
        if np.isfinite(limit):
            settings["swiglu_limit"] = limit
    given = isinstance(form, QMoEForm) and form.weights
    if isinstance(form, QMoEForm):
        values = _quantized(form, rng, shapes, graph, biases, settings, attributes)
    else:
        values = [codes.rounded(rng.standard_normal(s) / s[2] ** 0.5, form.x) for s in shapes]
        for index, value in enumerate(values):
            graph.tensor(value, form.x)
            graph.tensor(None if biases is None else biases[index], form.x)
    values = [np.asarray(v, np.float64) for v in values]

    def run(tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        x = codes.rounded(rng.standard_normal((tokens, form.h)) + 0.25, form.x)
        logits = _logits(form, rng, tokens)
        feeds = {"x_fed": x, "router_fed": logits, "rows": np.arange(tokens, dtype=np.int32)}
        mixing = None
        if given:
            mixing = feeds["weights_fed"] = codes.rounded(0.1 + 0.4 * rng.random(logits.shape), form.x)
        routes = experts.routed(form, logits.astype(np.float64), mixing)
        return feeds, experts.mixed(form, x.astype(np.float64), routes, values, biases)

    routed = {"router": ["T", count]} | ({"weights": ["T", count]} if given else {})
    return Case(_model(form, graph, settings, {"x": ["T", form.h]} | routed), run)


def _quantized(
    form: QMoEForm,
    rng: np.random.Generator,
    shapes: list[tuple[int, ...]],
    graph: _Graph,
    biases: list[np.ndarray] | None,
    settings: dict[str, object],
    attributes: Collection[str],
) -> list[np.ndarray]:
    """Appends the slots of a QMoE from the third on; returns what its weights stand for."""
    made = []
    points: list[np.ndarray | None] = []
    for index, shape in enumerate(shapes):
        bits = form.bits[index % 2]
        if form.quant == "int":
            own = "packed" if form.zeros in ("all", f"fc{index + 1}") else "none"
            weight = codes.integers(rng, shape, bits, form.block, own, form.x, signed=form.scales == "signed")
            graph.tensor(_bytes(form, weight.codes, bits))
            graph.tensor(weight.scales if form.block else weight.scales[..., 0], form.x)
            zeros = weight.zeros
            if zeros is not None:
                zeros = codes.packed((zeros if form.block else zeros[..., 0]).astype(np.uint8), bits, 2 ** (bits - 1))
            points.append(zeros)
        else:
            weight = codes.floats(rng, shape, form.quant)
            columns = form.layout == "columns"
            graph.tensor(codes.packed(np.swapaxes(weight.codes, 1, 2) if columns else weight.codes, 4))
            kind = "FLOAT8E8M0" if form.quant == "mxfp4" else "FLOAT8E4M3FN"
            graph.tensor(weight.scales, kind, raw=weight.scales.tobytes())
        graph.tensor(None if biases is None else biases[index], form.x)
        made.append(weight.value)
    if form.quant == "int":
        for _ in range(11 - len(graph.names)):
            graph.tensor(None)
        for zeros in points:
            graph.tensor(zeros)
    for _ in range(14 - len(graph.names)):
        graph.tensor(None)
    if form.weights:
        graph.value("weights")
    if form.quant != "int":
        if not form.weights:
            graph.tensor(None)
        factors = (0.5 + rng.random((len(shapes), shapes[0][0]))).astype(np.float32)
        for index, factor in enumerate(factors):
            graph.tensor(factor, "FLOAT")
            made[index] = made[index] * factor[:, None, None]
        settings["quant_type"] = "fp4" if form.quant == "mxfp4" else form.quant
    settings["expert_weight_bits"] = form.bits[0]
    if form.bits[0] != form.bits[1]:
        settings |= {f"fc{n}_expert_weight_bits": form.bits[(n - 1) % 2] for n in (1, 2)}
    if form.block:
        settings["block_size"] = form.block
    if form.level:
        settings["accuracy_level"] = form.level
    if form.prepacked == "auto" and "weights_prepacked" in attributes:
        settings["weights_prepacked"] = int(form.layout != "raw")
    elif form.prepacked not in ("auto", "none"):
        settings["weights_prepacked"] = int(form.prepacked)
    return made


def _bytes(form: QMoEForm, values: np.ndarray, bits: int) -> np.ndarray:
    if form.layout in ("sm80", "sm90"):
        return np.stack([codes.cutlass(own, bits, int(form.layout[2:])) for own in values])
    return codes.packed(values, bits)


def _count(form: MoEForm) -> int:
    """How many experts: more than a token has, and the sparse mixer takes 8 or 16."""
    return 8 if form.sparse or form.top > 3 else 4


def _logits(form: MoEForm, rng: np.random.Generator, tokens: int) -> np.ndarray:
    """[T, E] logits without near ties, which rounding would turn; for the sparse mixer, in pairs that it mixes."""
    steps = rng.permuted(np.tile(np.arange(_count(form)), (tokens, 1)), axis=1)
    return codes.rounded(2 + steps // 2 / 8 + steps % 2 / 32 if form.sparse else steps / 2 - 1.5, form.x)


def _model(form: Form, graph: _Graph, settings: dict[str, object], fed: dict[str, list]) -> bytes:
    own = getattr(TensorProto, form.x)
    nodes = []
    inputs = [helper.make_tensor_value_info("rows", TensorProto.INT32, ["T"])]
    for name, shape in fed.items():
        inputs.append(helper.make_tensor_value_info(f"{name}_fed", TensorProto.FLOAT, shape))
        nodes.append(helper.make_node("Cast", [f"{name}_fed"], [f"{name}_cast"], to=own))
        if name == "x":
            nodes.append(helper.make_node("Gather", ["x_cast", "rows"], ["x_flat"]))
            raised = isinstance(form, MoEForm) and form.rank == 3
            nodes.append(helper.make_node("Unsqueeze" if raised else "Identity", ["x_flat", *["zero"] * raised], ["x"]))
        else:
            nodes.append(helper.make_node("Identity", [f"{name}_cast"], [name]))
    nodes.append(helper.make_node(form.operator, graph.inputs(), ["y"], domain="com.microsoft", **settings))
    last = "y"
    if isinstance(form, MoEForm) and form.rank == 3:
        nodes.append(helper.make_node("Squeeze", ["y", "zero"], ["y_flat"]))
        last = "y_flat"
    if "x" in fed:
        nodes.append(helper.make_node("Gather", [last, "rows"], ["y_rows"]))
        last = "y_rows"
    nodes.append(helper.make_node("Cast", [last], ["out"], to=TensorProto.FLOAT))
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    rank = form.rank if isinstance(form, LookupForm) else 2
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)
    made = helper.make_graph(nodes, "probe", inputs, [out], [*graph.tensors, zero])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    scales = any(t.data_type == getattr(TensorProto, "FLOAT8E8M0", -1) for t in graph.tensors)
    return helper.make_model(made, opset_imports=opsets, ir_version=12 if scales else 10).SerializeToString()
