"""Messages that onnx-ir would read as something else, or lose a part of, are refused; the others mean what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from io_models import external, linear
from onnx import TensorProto, helper

from rewriter import io
from rewriter.errors import ModelError, RewriterWarning

TYPED = {
    "FLOAT": np.arange(6),
    "DOUBLE": np.arange(6),
    "INT32": np.arange(6),
    "INT64": np.arange(6),
    "UINT64": np.arange(6),
    "FLOAT16": np.arange(6),
    "BFLOAT16": np.arange(6),
    "BOOL": np.arange(6) % 2,
    "FLOAT8E4M3FN": np.arange(6),
    "INT4": np.arange(5),
    "UINT4": np.arange(5),
    "COMPLEX64": np.arange(6),
}


def refused(proto: onnx.ModelProto, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        io.parsed(proto)
    for word in words:
        assert word in str(caught.value)


def with_tensor(tensor: onnx.TensorProto) -> onnx.ModelProto:
    proto = linear()
    proto.graph.initializer.append(tensor)
    return proto


def sparse_constant(proto: onnx.ModelProto) -> None:
    values, at = helper.make_tensor("v", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [3])
    sparse = helper.make_sparse_tensor(values, at, [4])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))


@pytest.mark.parametrize("name", TYPED)
def test_typed_data_of_the_right_length_are_read(name: str) -> None:
    dtype = ir.DataType[name]
    array = TYPED[name].astype(dtype.numpy())
    tensor = helper.make_tensor("t", dtype.value, array.shape, array)
    assert not tensor.HasField("raw_data")
    stored = io.parsed(with_tensor(tensor)).graph.initializers["t"].const_value
    assert stored is not None and np.array_equal(stored.numpy(), array)
    refused(with_tensor(TensorProto(name="t", data_type=dtype.value, dims=array.shape)), "'t'", "has 0")


def test_strings_are_counted() -> None:
    io.parsed(with_tensor(helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"])))
    short = TensorProto(name="t", data_type=TensorProto.STRING, dims=[2], string_data=[b"a"])
    refused(with_tensor(short), "takes 2 entries and has 1")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda proto: proto.ClearField("graph"), "no whole model"),
        (lambda proto: proto.ClearField("opset_import"), "no whole model"),
        (lambda proto: setattr(proto, "ir_version", 0), "no whole model"),
        (lambda proto: setattr(proto, "ir_version", onnx.IR_VERSION + 1), "IR version"),
        (lambda proto: proto.training_info.add(), "training information"),
        (lambda proto: proto.graph.sparse_initializer.add(), "sparse initializers"),
        (lambda proto: proto.graph.initializer[0].ClearField("raw_data"), "takes 2,048 entries and has 0"),
        (sparse_constant, "attribute 'sparse_value' of node '' (Constant) is sparse"),
    ],
)
def test_what_would_be_lost_is_refused(change: Callable[[onnx.ModelProto], object], word: str) -> None:
    proto = linear()
    change(proto)
    refused(proto, word)


@pytest.mark.parametrize("read", [io.parsed, lambda proto: io.copied(ir.from_proto(proto))])
def test_the_standard_domain_has_one_name(read: Callable[[onnx.ModelProto], ir.Model]) -> None:
    proto = linear()
    proto.opset_import[0].domain = "ai.onnx"
    node = helper.make_node("Neg", ["a"], ["b"], domain="ai.onnx")
    proto.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node], [helper.make_opsetid("ai.onnx", 20)]))
    model = read(proto)
    assert model.opset_imports == {"": 20}
    (function,) = model.functions.values()
    assert function.opset_imports == {"": 20} and function[0].domain == ""


def test_external_data_of_a_message_lie_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    refused(proto, "initializer 'w'", "give the path of the model")
    monkeypatch.chdir(tmp_path)
    assert io.parsed(proto).graph.initializers["w"].const_value.nbytes == 8192


def test_external_data_of_a_model_object_must_be_there(tmp_path: Path) -> None:
    model = ir.load(external(tmp_path))
    io.copied(model)
    (tmp_path / "w.data").unlink()
    with pytest.raises(ModelError, match=r"initializer 'w': there is no external data file '.*w\.data'"):
        io.copied(model)


def test_what_is_not_carried_is_named() -> None:
    annotated, placed = linear(), linear()
    annotated.graph.quantization_annotation.add(tensor_name="h")
    placed.graph.node[0].device_configurations.add(configuration_id="cfg")
    with pytest.warns(RewriterWarning, match="quantization annotations are left out"):
        io.parsed(annotated)
    with pytest.warns(RewriterWarning, match="placed on none"):
        io.parsed(placed)


def declaring(tmp_path: Path, *infos: onnx.ValueInfoProto) -> tuple[ir.Model, ir.Model]:
    """A model with declared values as a message gives it, and as a file does."""
    proto = linear()
    proto.graph.node.append(helper.make_node("Relu", ["h"], ["again"]))
    proto.graph.value_info.extend(infos)
    onnx.save(proto, tmp_path / "model.onnx")
    return io.parsed(proto), io.load(tmp_path / "model.onnx")


def test_a_file_declares_what_its_message_does(tmp_path: Path) -> None:
    plain = helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", -1, 32], doc_string="said")
    plain.metadata_props.add(key="mine", value="kept")
    named = helper.make_tensor_value_info("again", TensorProto.FLOAT, ["n", 32])
    named.type.denotation = "IMAGE"
    for infos in (
        [plain, named],
        [helper.make_tensor_sequence_value_info("h", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["other", 7]) for name in ("x", "y", "w", "nothing")],
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, size) for size in (["n"], None)],
    ):
        parsed, loaded = declaring(tmp_path, *infos)
        assert ir.to_proto(parsed).graph == ir.to_proto(loaded).graph


def test_a_declared_type_is_of_one_value_alone(tmp_path: Path) -> None:
    _, model = declaring(
        tmp_path, *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("h", "again"))
    )
    h, again = model.graph[0].outputs[0], model.graph[-1].outputs[0]
    h.dtype = ir.DataType.FLOAT16
    assert again.dtype == ir.DataType.FLOAT


def test_a_declared_shape_that_no_array_has_is_refused_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'h' is declared with 1 dimensions and 2e\\+15 elements"):
        declaring(tmp_path, helper.make_tensor_value_info("h", TensorProto.FLOAT, [2 * 10**15]))
