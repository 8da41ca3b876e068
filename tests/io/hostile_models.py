"""Models that no exporter writes, each of one kind; what is asked of them is one line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

Change = Callable[[onnx.ModelProto], None]


def plain() -> onnx.ModelProto:
    """y = relu(x @ w + b)."""
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
            helper.make_node("Add", ["h", "b"], ["s"], "add"),
            helper.make_node("Relu", ["s"], ["y"], "relu"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(values, "w"), numpy_helper.from_array(np.ones(32, np.float32), "b")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def weight(model: onnx.ModelProto) -> TensorProto:
    return model.graph.initializer[0]


def dims(*given: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        weight(model).dims[:] = given

    return change


def dtype(number: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        weight(model).data_type = number

    return change


def typed(field: str, values: list[object], number: int = TensorProto.FLOAT, shape: tuple[int, ...] = (2, 2)) -> Change:
    """Data in a field of any type, for a tensor of any type."""

    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        tensor.ClearField("raw_data")
        tensor.data_type = number
        tensor.dims[:] = shape
        getattr(tensor, field).extend(values)

    return change


def external(**entries: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = weight(model)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def string_data(model: onnx.ModelProto) -> None:
    external(location="w.data", offset="0", length="8192")(model)
    weight(model).data_type = TensorProto.STRING


def attribute(**fields: object) -> Change:
    """An attribute of the MatMul that says nothing sensible."""

    def change(model: onnx.ModelProto) -> None:
        found = model.graph.node[0].attribute.add()
        found.name = "a"
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(found, name).extend(value)
            else:
                setattr(found, name, value)

    return change


def node(op_type: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.insert(0, helper.make_node(op_type, inputs, outputs, "extra", domain=domain, **attributes))

    return change


def renamed(old: str, new: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for each in model.graph.node:
            each.input[:] = [new if name == old else name for name in each.input]
            each.output[:] = [new if name == old else name for name in each.output]
        for each in (*model.graph.initializer, *model.graph.input, *model.graph.output):
            each.name = new if each.name == old else each.name

    return change


def opset(domain: str, version: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import.add(domain=domain, version=version)

    return change


def standard_opset(version: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def ir_version(version: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.ir_version = version

    return change


def input_shape(*given: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, given))

    return change


def input_type(make: Callable[[onnx.TypeProto], object]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.Clear()
        make(model.graph.input[0].type)

    return change


def value_info(name: str, shape: list[object], number: int = TensorProto.FLOAT) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.value_info.append(helper.make_tensor_value_info(name, number, shape))

    return change


def nested(depth: int) -> Change:
    """Ifs in Ifs."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
        inner = helper.make_node("Identity", ["b"], ["o"])
        for index in range(depth):
            body = helper.make_graph(
                [inner], f"g{index}", [], [helper.make_tensor_value_info(inner.output[0], TensorProto.FLOAT, [32])]
            )
            inner = helper.make_node("If", ["c"], [f"o{index}"], then_branch=body, else_branch=body)
        model.graph.node.append(inner)

    return change


def nested_types(depth: int) -> Change:
    """Sequences of sequences."""

    def change(model: onnx.ModelProto) -> None:
        found = model.graph.input[0].type
        found.Clear()
        for _ in range(depth):
            found = found.sequence_type.elem_type
        found.tensor_type.elem_type = TensorProto.FLOAT

    return change


def function(make: Callable[[onnx.FunctionProto], object], calls: int = 1) -> Change:
    def change(model: onnx.ModelProto) -> None:
        found = model.functions.add()
        found.name, found.domain = "f", "mine"
        found.input.append("a")
        found.output.append("z")
        found.opset_import.add(domain="", version=20)
        make(found)
        model.opset_import.add(domain="mine", version=1)
        for index in range(calls):
            model.graph.node.append(helper.make_node("f", ["y"], [f"called{index}"], domain="mine"))

    return change


def body(*nodes: onnx.NodeProto) -> Callable[[onnx.FunctionProto], object]:
    return lambda found: found.node.extend(nodes)


def calls_itself(found: onnx.FunctionProto) -> None:
    found.node.append(helper.make_node("f", ["a"], ["z"], domain="mine"))
    found.opset_import.add(domain="mine", version=1)


def scalar(model: onnx.ModelProto) -> None:
    weight(model).CopyFrom(numpy_helper.from_array(np.float32(1), "w"))


def twice(field: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        found = getattr(model.graph, field)
        found.append(found[0])

    return change


def both(first: Change, second: Change) -> Change:
    def change(model: onnx.ModelProto) -> None:
        first(model)
        second(model)

    return change


def calls(depth: int) -> Change:
    """Functions that call the next one twice."""

    def change(model: onnx.ModelProto) -> None:
        for index in range(depth):
            found = model.functions.add()
            found.name, found.domain = f"f{index}", "mine"
            found.input.append("a")
            found.output.append("z")
            found.opset_import.add(domain="", version=20)
            found.opset_import.add(domain="mine", version=1)
            op_type, domain = (f"f{index + 1}", "mine") if index < depth - 1 else ("Relu", "")
            found.node.append(helper.make_node(op_type, ["a"], ["m"], domain=domain))
            found.node.append(helper.make_node(op_type, ["m"], ["z"], domain=domain))
        model.opset_import.add(domain="mine", version=1)
        model.graph.node.append(helper.make_node("f0", ["y"], ["called"], domain="mine"))

    return change


def cleared(*path: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        owner: object = model
        for name in path[:-1]:
            owner = getattr(owner, name)
            owner = owner[0] if not hasattr(owner, "ClearField") else owner  # type: ignore[index]
        owner.ClearField(path[-1])  # type: ignore[attr-defined]

    return change


def metadata(key: str, value: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.metadata_props.add(key=key, value=value)

    return change


HOSTILE: dict[str, Change] = {
    # shapes and types of tensors
    "a negative dimension": dims(-64, 32),
    "two negative dimensions": dims(-64, -32),
    "a dimension of 2^62": dims(1 << 62, 32),
    "dimensions of 2^62": dims(1 << 62, 1 << 62),
    "the largest dimension": dims((1 << 63) - 1),
    "the least dimension": dims(-(1 << 63), 32),
    "no element, and 2^62": dims(0, 1 << 62),
    "no element": dims(0, 32),
    "a thousand dimensions": dims(*[1] * 1000),
    "no dimension": dims(),
    "an unknown type": dtype(99),
    "a negative type": dtype(-1),
    "no type": dtype(0),
    "text": dtype(TensorProto.STRING),
    "complex": dtype(TensorProto.COMPLEX64),
    "booleans": dtype(TensorProto.BOOL),
    "4 bits": dtype(TensorProto.INT4),
    "8-bit floats": dtype(TensorProto.FLOAT8E4M3FN),
    "double, of half the elements": dtype(TensorProto.DOUBLE),
    # data in fields
    "typed floats as double": typed("float_data", [1.0] * 4, TensorProto.DOUBLE),
    "typed doubles as float": typed("double_data", [1.0] * 4),
    "typed integers as float": typed("int32_data", [1] * 4),
    "typed integers as float16": typed("int32_data", [1 << 20] * 4, TensorProto.FLOAT16),
    "negative integers as float16": typed("int32_data", [-1] * 4, TensorProto.FLOAT16),
    "typed integers as bfloat16": typed("int32_data", [1 << 20] * 4, TensorProto.BFLOAT16),
    "typed long integers as int32": typed("int64_data", [1 << 40] * 4, TensorProto.INT32),
    "typed text as float": typed("string_data", [b"a"] * 4),
    "typed floats as text": typed("float_data", [1.0] * 4, TensorProto.STRING),
    "typed text": typed("string_data", [b"\xff\0"] * 4, TensorProto.STRING),
    "typed integers as int8, too large": typed("int32_data", [1 << 20] * 4, TensorProto.INT8),
    "typed integers as bool": typed("int32_data", [7] * 4, TensorProto.BOOL),
    "typed unsigned as int64": typed("uint64_data", [1 << 63] * 4, TensorProto.INT64),
    "typed 4 bits": typed("int32_data", [300] * 2, TensorProto.INT4),
    "too few typed floats": typed("float_data", [1.0] * 3),
    "raw data and typed ones": lambda model: weight(model).float_data.extend([1.0]),
    "no data": lambda model: weight(model).ClearField("raw_data"),
    "a byte too few": lambda model: setattr(weight(model), "raw_data", weight(model).raw_data[:-1]),
    "infinities": lambda model: setattr(weight(model), "raw_data", np.full(2048, np.inf, np.float32).tobytes()),
    "not numbers": lambda model: setattr(weight(model), "raw_data", np.full(2048, np.nan, np.float32).tobytes()),
    "the largest numbers": lambda model: setattr(
        weight(model), "raw_data", np.full(2048, np.finfo(np.float32).max).tobytes()[:8192]
    ),
    "a segment": lambda model: setattr(weight(model).segment, "begin", 5),
    # external data
    "no location": external(offset="0"),
    "an empty location": external(location=""),
    "a location with NUL": external(location="w\0.data"),
    "a location that is the folder": external(location="."),
    "a location that is the model": external(location="model.onnx"),
    "a location above": external(location="../w.data"),
    "a long location": external(location="w" * 5000),
    "a location of a thousand parts": external(location="a/" * 1000 + "w.data"),
    "a negative offset": external(location="w.data", offset="-1"),
    "an endless offset": external(location="w.data", offset="9" * 5000),
    "an offset of another script": external(location="w.data", offset="٣"),
    "an offset of 2^63": external(location="w.data", offset=str(1 << 63)),
    "an offset that wraps round": external(location="w.data", offset=str((1 << 64) - 8192), length="8192"),
    "an odd offset": external(location="w.data", offset="1", length="8191"),
    "no length": external(location="w.data", offset="0", length=""),
    "text as an external tensor": string_data,
    "a checksum": external(location="w.data", checksum="x", basepath="/etc"),
    "unknown entries": external(location="w.data", mine="yours"),
    # names
    "an empty weight name": renamed("w", ""),
    "a name with NUL": renamed("w", "w\0"),
    "a name of a megabyte": renamed("w", "w" * (1 << 20)),
    "an output without a name": renamed("y", ""),
    "a weight that is an output": renamed("y", "w"),
    "an input that is an output": renamed("y", "x"),
    "an operator without a name": node("", ["x"], ["extra_out"]),
    "an operator of a long name": node("O" * 100_000, ["x"], ["extra_out"]),
    "a domain with NUL": node("MatMul", ["x", "w"], ["extra_out"], "a\0b"),
    "a node without outputs": node("Relu", ["x"], []),
    "a node without inputs": node("Relu", [], ["extra_out"]),
    "a node of empty inputs": node("MatMul", ["", ""], ["extra_out"]),
    "a thousand inputs": node("Concat", ["x"] * 1000, ["extra_out"], axis=0),
    # the graph
    "a value from nowhere": node("Relu", ["nowhere"], ["extra_out"]),
    "a node that reads itself": node("Relu", ["extra_out"], ["extra_out"]),
    "a cycle": both(node("Relu", ["p"], ["q"]), node("Relu", ["q"], ["p"])),
    "a node twice": twice("node"),
    "an input twice": twice("input"),
    "an output twice": twice("output"),
    "a weight twice": twice("initializer"),
    "no output": cleared("graph", "output"),
    "no input": cleared("graph", "input"),
    "no node": cleared("graph", "node"),
    "no graph": cleared("graph"),
    "no opset": cleared("opset_import"),
    "no IR version": cleared("ir_version"),
    "no type of the input": cleared("graph", "input", "type"),
    "no type of the output": cleared("graph", "output", "type"),
    "ifs in ifs, 8 deep": nested(8),
    "types in types": nested_types(90),
    "an If without branches": node("If", ["b"], ["extra_out"]),
    "a Loop without a body": node("Loop", ["", ""], ["extra_out"]),
    "a Loop whose body is a number": node("Loop", ["", ""], ["extra_out"], body=3),
    "a Constant without a value": node("Constant", [], ["extra_out"]),
    "a Constant of two values": node("Constant", [], ["extra_out"], value_int=1, value_float=2.0),
    "a Reshape to 2^62": node("Reshape", ["x", "b"], ["extra_out"]),
    # attributes
    "an attribute without a type": attribute(f=1.0),
    "an attribute of another type": attribute(type=AttributeProto.INTS, f=1.0),
    "an attribute of an unknown type": attribute(type=AttributeProto.UNDEFINED),
    "an attribute without a name": attribute(name="", type=AttributeProto.INT, i=1),
    "an attribute twice": both(attribute(type=AttributeProto.INT, i=1), attribute(type=AttributeProto.INT, i=2)),
    "an attribute that refers to nothing": attribute(type=AttributeProto.INT, ref_attr_name="nothing"),
    "an attribute of bytes": attribute(type=AttributeProto.STRING, s=b"\xff\xfe"),
    "an empty tensor attribute": attribute(type=AttributeProto.TENSOR),
    "an empty graph attribute": attribute(type=AttributeProto.GRAPH),
    "an empty sparse attribute": attribute(type=AttributeProto.SPARSE_TENSOR),
    "an empty type attribute": attribute(type=AttributeProto.TYPE_PROTO),
    "transA of a Gemm is text": node("Gemm", ["x", "w"], ["extra_out"], transA="yes"),
    "a Transpose by 2^40": node("Transpose", ["w"], ["extra_out"], perm=[1 << 40, 0]),
    "a Transpose by too few": node("Transpose", ["w"], ["extra_out"], perm=[0]),
    "a Gather of axis 2^40": node("Gather", ["w", "b"], ["extra_out"], axis=1 << 40),
    "an Einsum of nonsense": node("Einsum", ["x", "w"], ["extra_out"], equation="->->,..."),
    "an Einsum of no equation": node("Einsum", ["x", "w"], ["extra_out"]),
    "a Cast to nothing": node("Cast", ["w"], ["extra_out"], to=99),
    "a Split of nothing": node("Split", ["w"], ["extra_out"], num_outputs=0),
    "MatMulNBits of 0 bits": node("MatMulNBits", ["x", "w", "b"], ["e"], "com.microsoft", K=64, N=32, bits=0),
    "MatMulNBits of 2^40": node("MatMulNBits", ["x", "w", "b"], ["e"], "com.microsoft", K=1 << 40, N=1 << 40, bits=4),
    "QMoE of nothing": node("QMoE", ["x"], ["extra_out"], "com.microsoft"),
    "MoE of a weight of rank 2": node("MoE", ["x", "x", "w", "", "w"], ["extra_out"], "com.microsoft", k=1 << 40),
    # versions and imports
    "a negative opset": standard_opset(-1),
    "opset 0": standard_opset(0),
    "an opset to come": standard_opset(1 << 40),
    "an opset twice": opset("", 13),
    "a domain of a megabyte": opset("a" * (1 << 20), 1),
    "a negative IR version": ir_version(-1),
    "an IR version to come": ir_version(1 << 40),
    # declared types and shapes
    "an input of negative size": input_shape(-5, 64),
    "an input of 2^62 rows": input_shape(1 << 62, 64),
    "an input of rank 0": input_shape(),
    "an input of 1,000 dimensions": input_shape(*[1] * 1000),
    "an input of an endless name": input_shape("n" * 100_000, 64),
    "an input of an unknown type": input_type(lambda t: setattr(t.tensor_type, "elem_type", 99)),
    "an input that is a sequence": input_type(lambda t: setattr(t.sequence_type.elem_type.tensor_type, "elem_type", 1)),
    "an input that is a map": input_type(lambda t: setattr(t.map_type, "key_type", 7)),
    "an input that is sparse": input_type(lambda t: setattr(t.sparse_tensor_type, "elem_type", 1)),
    "an input that is optional": input_type(lambda t: setattr(t.optional_type.elem_type.tensor_type, "elem_type", 1)),
    "an input of an empty sequence type": input_type(lambda t: t.sequence_type.SetInParent()),
    "a value of another type": value_info("h", ["n", 32], TensorProto.STRING),
    "a value of another rank": value_info("h", [1, 2, 3, 4]),
    "a value of negative size": value_info("h", [-1, -1]),
    "a value of an unknown type": value_info("h", ["n", 32], 99),
    "a value that is not there": value_info("nothing", [1]),
    # functions
    "a function that calls itself": function(calls_itself),
    "a function without nodes": function(body()),
    "a function of an undefined output": function(body(helper.make_node("Relu", ["a"], ["other"]))),
    "a function that reads nothing there is": function(body(helper.make_node("Relu", ["nowhere"], ["z"]))),
    "a function that is a cycle": function(
        body(helper.make_node("Relu", ["z"], ["q"]), helper.make_node("Relu", ["q"], ["z"]))
    ),
    "a function without a name": function(lambda f: (setattr(f, "name", ""), calls_itself(f))),
    "a function of a standard name": function(
        lambda f: (setattr(f, "name", "MatMul"), setattr(f, "domain", ""), calls_itself(f))
    ),
    "a function of no opset": function(lambda f: (f.ClearField("opset_import"), calls_itself(f))),
    "functions that call the next twice, 30 deep": calls(30),
    "a scalar as a weight": scalar,
    "metadata of a megabyte": metadata("k", "v" * (1 << 20)),
    "metadata with NUL": metadata("k\0", "v\0"),
}
"""What is done to a sound model, by its kind."""


def _broken(field: bytes, with_: bytes) -> bytes:
    return plain().SerializeToString().replace(field, with_)


def _nested(depth: int) -> bytes:
    """A message in a message: a GraphProto in an attribute of a node, and so on, without a name or a type."""
    inner = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            size, length = len(inner), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            inner = tag + length + bytes([size]) + inner
    return inner


BYTES: dict[str, bytes] = {
    "names that are not UTF-8": _broken(b"MatMul", b"Mat\xfful"),
    "a weight's name that is not UTF-8": _broken(b"\x01w", b"\x01\xff"),
    "an input's name that is not UTF-8": _broken(b"\x01x", b"\x01\xfe"),
    "an axis' name that is not UTF-8": _broken(b"\x01n", b"\x01\xfd"),
    "a node's name that is not UTF-8": _broken(b"\x02mm", b"\x02\xc3\x28"),
    "the graph's name that is not UTF-8": _broken(b"\x01g", b"\x01\xff"),
    "30 messages in messages": plain().SerializeToString() + b"\x3a" + bytes([0]) + _nested(9),
    "100 messages in messages": plain().SerializeToString() + _nested(100),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"ir_version: 10\n" * 100,
    "a zip file": b"PK\x03\x04" + bytes(100),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "HTML": b"<!DOCTYPE html><html>404</html>",
    "half of it": plain().SerializeToString()[:4000],
    "twice": plain().SerializeToString() * 2,
    "a byte too many": plain().SerializeToString() + b"\x0a",
    "nothing": b"",
}
"""Bytes that are no model, or half of one."""
