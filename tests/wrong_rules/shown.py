"""Models that show mistakes, each drawn from a few choices; quantized ones are made while every rule is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from block_models import Spelling, block_model
from embedding_models import graph_of
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from moe_models import SWIGLU, moe_model

import rewriter

Models = Callable[[], SearchStrategy[ir.Model]]
FUSED = SWIGLU | {"k": 2, "swiglu_fusion": 1, "normalize_routing_weights": 1}


def ruled(*rules: Any, target: str = "cpu", **default: Any) -> dict[str, Any]:
    """A rule set of these rules; ``default`` is the plan's."""
    phases = [{"name": "test", "rules": list(rules)}]
    return {"description": "A test.", "phases": phases, "target": target, "quantization": {"default": default}}


def drawn(*models: onnx.ModelProto) -> SearchStrategy[ir.Model]:
    """Draws one of some models."""
    return st.sampled_from(models).map(ir.from_proto)


def blocks(**choices: Sequence[Any] | Any) -> Models:
    """Blocks of experts in plain operators; each argument is a field of ``Spelling``, or a list to choose from."""
    return lambda: drawn(*(onnx.shape_inference.infer_shapes(block_model(Spelling(**how))) for how in _each(choices)))


def quantized_blocks(bits: int = 4, symmetric: bool = True, **choices: Sequence[Any] | Any) -> Models:
    """Blocks whose experts are MatMulNBits; the router stays float."""
    plan = {
        "default": {"bits": bits, "block_size": 16, "symmetric": symmetric},
        "exclude": [{"role": "router"}],
    }
    phases = [{"name": "test", "rules": ["matmul-to-matmul-nbits"]}]
    rules = {"description": "A test.", "phases": phases, "quantization": plan}
    fixed = {"hidden": 32, "inter": 32, "weights": "own", "experts": 3}
    return lambda: drawn(*(rewriter.apply(block_model(Spelling(**fixed | how)), rules).model for how in _each(choices)))


def moes(attributes: Any = FUSED, **choices: Sequence[Any] | Any) -> Models:
    """com.microsoft::MoE nodes; each argument is one of ``moe_model``'s, or a list to choose from."""
    small = {"hidden": 32, "inter": 32, "experts": 3}
    return lambda: drawn(*(_biased(attributes, **small | how) for how in _each(choices)))


def _biased(attributes: Any, *, bias: str = "random", given: str = "", **how: Any) -> onnx.ModelProto:
    """An MoE some of whose biases are zero; one that is ``given`` may be overridden by a caller."""
    zeros = {"fc1-zero": ("fc1_bias", slice(None)), "first-zero": ("fc", 0)}.get(bias)
    model = moe_model(attributes, bias="random" if zeros else bias, **how)
    for tensor in model.graph.initializer:
        if zeros and "bias" in tensor.name and zeros[0] in tensor.name:
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[zeros[1]] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        if tensor.name == given:
            model.graph.input.append(onnx.helper.make_tensor_value_info(given, tensor.data_type, tensor.dims))
    return _typed(model)


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model; what lies between its layers has the type of its output."""
    (output,) = model.graph.output
    for node in model.graph.node[:-1]:
        between = onnx.ValueInfoProto(name=node.output[0], type=output.type)
        model.graph.value_info.append(between)
    return model


def qmoes(plan: Any = (), attributes: Any = FUSED, mixed: bool = False, **choices: Sequence[Any] | Any) -> Models:
    """com.microsoft::QMoE nodes; where ``mixed``, their router_weights are no softmax of router_probs."""
    small = {"hidden": 128, "inter": 128, "experts": 3}
    rules = ruled("moe-to-qmoe", **dict(plan))

    def made(how: dict[str, Any]) -> onnx.ModelProto:
        model = rewriter.apply(_typed(moe_model(attributes, **small | how)), rules).model
        for node in model.graph.node if mixed else ():
            if node.op_type == "Softmax":
                node.op_type = "Sigmoid"
                del node.attribute[:]
        return model

    return lambda: drawn(*map(made, _each(choices)))


def texts(*graphs: tuple[str, dict[str, np.ndarray[Any, Any]]]) -> Models:
    """Models from the textual form of their graphs, each with its initializers."""
    return lambda: drawn(*(graph_of(f"agraph {text}", weights) for text, weights in graphs))


def quantized_texts(rules: Any, *graphs: tuple[str, dict[str, np.ndarray[Any, Any]]]) -> Models:
    """As ``texts``, rewritten by some rules."""
    return lambda: drawn(*(rewriter.apply(graph_of(f"agraph {text}", w), rules).model for text, w in graphs))


def _each(choices: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the choices."""
    lists = [choice if isinstance(choice, list) else [choice] for choice in choices.values()]
    return [dict(zip(choices, one, strict=True)) for one in itertools.product(*lists)]
