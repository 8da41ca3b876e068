"""External data: checked when a model is loaded, mapped when it is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from io_models import MODELS, content, external, fails, linear
from onnx import TensorProto, helper

from rewriter import io
from rewriter.errors import ModelError
from rewriter.graph.contents import stored_tensors
from rewriter.tensors import MappedTensor, View, ViewTensor, drop_pages, mapped


def test_external_data_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path / "m")
    monkeypatch.chdir(path.parent)
    tensor = io.load("model.onnx").graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    monkeypatch.chdir("/")
    assert np.array_equal(tensor.numpy().reshape(-1), np.arange(64 * 32))
    assert np.asarray(tensor).nbytes == len(tensor.tobytes()) == 8192
    assert not tensor.numpy().flags.writeable


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, ("cannot be read", "w.data")),
        ({"size": 8191}, ("truncated", "8,191", "8,192")),
        ({"offset": 4}, ("truncated", "4 to 8,196")),
        ({"length": 8188}, ("takes 8,192 bytes", "8,188")),
        ({"offset": -4}, ("offset '-4'",)),
        ({"offset": "x"}, ("offset 'x'",)),
        ({"location": ""}, ("outside the model's directory",)),
        ({"location": "../w.data"}, ("outside the model's directory", "'../w.data'")),
        ({"location": "sub/../../w.data"}, ("outside the model's directory",)),
        ({"location": "/etc/hostname"}, ("outside the model's directory",)),
        ({"location": "."}, ("not a regular file",)),
    ],
)
def test_bad_external_data_is_refused(tmp_path: Path, arguments: dict[str, object], words: tuple[str, ...]) -> None:
    path = external(tmp_path / "m", **arguments)  # type: ignore[arg-type]
    shutil.copy(path, tmp_path / "w.data")
    fails(path, "'w'", "model.onnx", *words)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells which files are open")
def test_few_of_many_data_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MAPPED", 4)
    files = []
    for number in range(12):
        path = tmp_path / f"{number}.data"
        path.write_bytes(np.float32(number).tobytes())
        tensor = ir.ExternalTensor(path.name, 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="", base_dir=tmp_path)
        files.append(MappedTensor(tensor, tmp_path, mapped.MappedFile(path)))
    shown = files[0].numpy()
    for _ in range(2):
        assert [float(tensor.numpy()[0]) for tensor in files] == list(range(12))
    opened = [link.readlink().parent for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert opened.count(tmp_path) == 5  # that of what is still shown, too
    assert shown[0] == 0


def test_links_that_leave_the_directory_are_refused(tmp_path: Path) -> None:
    path = external(tmp_path / "m")
    data = path.parent / "w.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    fails(path, "a link to", "elsewhere", "copy the data file")
    data.unlink()
    (tmp_path / "elsewhere").rename(path.parent / "real.data")
    data.symlink_to("real.data")
    io.load(path)
    data.unlink()
    os.link(path.parent / "real.data", data)
    fails(path, "2 hard links", "cp ")


def test_external_data_in_subgraphs_and_functions_is_checked(tmp_path: Path) -> None:
    def tensor(name: str) -> onnx.TensorProto:
        made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        made.external_data.add(key="location", value=f"{name}.data")
        return made

    def branch(*inits: onnx.TensorProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [4])
        return helper.make_graph([helper.make_node("F", ["i"], ["o"], domain="own")], "branch", [], [out], list(inits))

    function = helper.make_function(
        "own",
        "F",
        ["a"],
        ["c"],
        [helper.make_node("Constant", [], ["k"], value=tensor("k")), helper.make_node("Add", ["a", "k"], ["c"])],
        [helper.make_opsetid("", 20)],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["p"], ["y"], then_branch=branch(tensor("i")), else_branch=branch(tensor("i")))],
        "g",
        [helper.make_tensor_value_info("p", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    proto = helper.make_model(graph, ir_version=10, opset_imports=imports, functions=[function])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    values = np.arange(4, dtype=np.float32)
    fails(tmp_path / "m.onnx", "initializer 'i'", "i.data")
    (tmp_path / "i.data").write_bytes(values.tobytes())
    fails(tmp_path / "m.onnx", "attribute 'value'", "k.data")
    (tmp_path / "k.data").write_bytes(values.tobytes())
    model = io.load(tmp_path / "m.onnx")
    before = [slot.tensor for slot in stored_tensors(model)]
    saved = io.load(io.save(model, tmp_path / "out", max_shard_size=1 << 20))
    assert [slot.tensor.tobytes() for slot in stored_tensors(saved)] == [values.tobytes()] * 3
    assert [slot.tensor for slot in stored_tensors(model)] == before


def test_narrow_types_read_from_a_file(tmp_path: Path) -> None:
    array = np.array([1, -8, 7], dtype=ir.DataType.INT4.numpy())
    value = ir.Value(name="w", const_value=ir.Tensor(array, dtype=ir.DataType.INT4, name="w"))
    model = io.load(MODELS / "torch_unroll/getitem_matmul_T__dynamo18_opt_f16.onnx")
    model.graph.register_initializer(value)
    stored = io.load(io.save(model, tmp_path / "o", max_shard_size=1 << 20)).graph.initializers["w"].const_value
    assert stored is not None and np.array_equal(stored.numpy(), array)


def test_many_tensors_of_a_huge_file_share_one_mapping(tmp_path: Path) -> None:
    size, count = 50 << 30, 3000  # a mapping each would take 150 TB of addresses; the file is sparse
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(size)
    proto = linear()
    for index in range(count):
        tensor = proto.graph.initializer.add(name=f"t{index}", data_type=TensorProto.FLOAT, dims=[256])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.data")
        tensor.external_data.add(key="offset", value=str(index * (size // count // 4096 * 4096)))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model = io.load(tmp_path / "m.onnx")
    arrays = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value]
    assert len(arrays) == count + 2 and not arrays[-1].any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident pages are read from /proc")
def test_dropped_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    def mapped_mb() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) >> 10

    rows, columns = 16, 1 << 20
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(rows * columns * 4)
    proto = linear()
    tensor = proto.graph.initializer.add(name="t", data_type=TensorProto.FLOAT, dims=[rows, columns])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    for load in (io.load, ir.load):
        held = load(tmp_path / "m.onnx").graph.initializers["t"].const_value
        assert held is not None
        start = mapped_mb()
        assert held.numpy().sum() == 0
        assert mapped_mb() - start > 48
        view = View.whole(held, "t").slice(0, 0, 8)
        drop_pages(view.index(0, 0))
        drop_pages(ViewTensor(view))
        assert 24 < mapped_mb() - start < 40
        drop_pages(held)
        assert mapped_mb() - start < 8
        assert held.numpy().sum() == 0
    drop_pages(ir.Tensor(np.zeros(3)))


def rewritten(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def replaced(file: Path) -> None:
    file.rename(file.with_suffix(".old"))
    shutil.copy(file.with_suffix(".old"), file)


CHANGES = {
    "written": rewritten,
    "replaced": replaced,
    "shorter": lambda file: os.truncate(file, 100),
    "longer": lambda file: os.truncate(file, 1 << 20),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_data_that_change_after_they_were_checked_are_refused(
    tmp_path: Path, change: Callable[[Path], None], read_before: bool
) -> None:
    path = external(tmp_path / "in")
    model = io.load(path)
    foreign = io.copied(ir.load(path))
    lazy = ir.LazyTensor(lambda: ir.tensor([1.0]), ir.DataType.FLOAT, ir.Shape([1]), name="w")
    if read_before:  # and nothing of it is read again: what was computed of it is old
        content(model)
        for each in (model, foreign):
            each.graph.initializers["w"].const_value = lazy
    change(tmp_path / "in" / "w.data")
    for each in (model, foreign):
        with pytest.raises(ModelError, match=r"w.data' was changed while it was read"):
            io.save(each, tmp_path / "out")
        with pytest.raises(ModelError, match=r"w.data' was changed while it was read"):
            io.to_proto(each)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
