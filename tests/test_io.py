"""Loading refuses bad input in one line; saving streams, and its output appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter import io
from rewriter.errors import ModelError, QuantizationError, UsageError
from rewriter.stored import stored_tensors, total_bytes
from rewriter.tensors import MappedTensor, View, ViewTensor, drop_pages

MODELS = Path(__file__).parent / "models"
INVALID = {"gemma4_fused_moe_pre324_malformed_f32", "gpt_oss_decomposed_dml_fp32"}
VALID = sorted(p for p in MODELS.rglob("*.onnx") if p.stem not in INVALID)


def linear(*weights: onnx.TensorProto, extra: int = 0) -> onnx.ModelProto:
    """y = x @ w + b, with ``extra`` 4 KB initializers that nothing reads."""
    initializers = list(weights) or [
        numpy_helper.from_array(np.arange(64 * 32, dtype=np.float32).reshape(64, 32), "w"),
        numpy_helper.from_array(np.ones(32, np.float32), "b"),
    ]
    initializers += [numpy_helper.from_array(np.full(1024, i, np.float32), f"e{i}") for i in range(extra)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        initializers,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def external(directory: Path, location: str = "w.data", *, size: int | None = None, **info: object) -> Path:
    """Writes a model whose ``w`` is external data of ``size`` bytes (8192 are right)."""
    directory.mkdir(parents=True, exist_ok=True)
    proto = linear()
    raw = proto.graph.initializer[0].raw_data
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": len(raw), **info}.items():
        if value is not None:
            proto.graph.initializer[0].external_data.add(key=key, value=str(value))
    if size != 0:
        (directory / "w.data").write_bytes(raw[:size])
    (directory / "model.onnx").write_bytes(proto.SerializeToString())
    return directory / "model.onnx"


def fails(path: Path | str, *words: str, kind: type[Exception] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        io.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def content(model: ir.Model) -> list[tuple[str, bytes]]:
    return [(slot.label, slot.tensor.tobytes()) for slot in stored_tensors(model)]


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


# Loading


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.stem)
def test_real_models_load_and_come_back(path: Path, tmp_path: Path) -> None:
    model = io.load(path)
    assert io.source_path(model) == path
    for shards in (None, 50_000):
        saved = io.save(model, tmp_path / str(shards), max_shard_size=shards)
        assert content(io.load(saved)) == content(model)
        assert io.load(saved.parent).graph.num_nodes() == model.graph.num_nodes()


def test_invalid_real_models_are_refused() -> None:
    fails(MODELS / "genai/gpt_oss_decomposed_dml_fp32.onnx", "'present.0.key'", "defined by no node")
    fails(
        MODELS / "mobius/gemma4_fused_moe_pre324_malformed_f32.onnx",
        "required input 4 (fc2_experts_weights) is missing",
        "input 3 (fc1_experts_bias) holds 'model.layers.0.fc2_experts_weights'",
    )


def test_unsorted_nodes_are_sorted_in_memory(tmp_path: Path) -> None:
    path = MODELS / "genai_old/phimoe_int4_cuda_071.onnx"
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"):
        onnx.checker.check_model(onnx.load(path))
    proto = linear()
    proto.graph.node.insert(0, proto.graph.node.pop())
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert [node.op_type for node in io.load(tmp_path / "m.onnx").graph] == ["MatMul", "Add"]


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    for name, data in {
        "random": np.random.default_rng(0).bytes(4096),
        "text": b"# a markdown file\n" * 10,
        "half": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "empty": b"",
        "no graph": onnx.ModelProto(ir_version=8).SerializeToString(),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }.items():
        (tmp_path / "m.onnx").write_bytes(data)
        message = fails(tmp_path / "m.onnx", "m.onnx", "not an ONNX model")
        assert ("git lfs pull" in message) == (name == "lfs")
    (tmp_path / "m.onnx").write_bytes(b"")
    fails(tmp_path / "m.onnx", "the file is empty")


def test_paths_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    fails(tmp_path / "none.onnx", "there is no file", "none.onnx")
    fails(tmp_path, "holds no .onnx file")
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(linear().SerializeToString())
    fails(tmp_path, "a.onnx, b.onnx", "name one")
    (tmp_path / "b.onnx").unlink()
    assert io.source_path(io.load(tmp_path)) == tmp_path / "a.onnx"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    proto = linear()
    proto.ir_version = onnx.IR_VERSION + 1
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    fails(tmp_path / "m.onnx", "IR version", "pip install")


def test_damaged_initializers_are_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.zeros((64, 32), np.float32), "w")
    bias = numpy_helper.from_array(np.zeros(32, np.float32), "b")
    (tmp_path / "twice.onnx").write_bytes(linear(weight, bias, weight).SerializeToString())
    fails(tmp_path / "twice.onnx", "two initializers are named 'w'")
    bias.raw_data = bias.raw_data[:-4]
    (tmp_path / "short.onnx").write_bytes(linear(weight, bias).SerializeToString())
    fails(tmp_path / "short.onnx", "'b'", "128 bytes", "124")


def test_functions_without_their_output_are_refused(tmp_path: Path) -> None:
    proto = linear()
    nodes = [helper.make_node("Neg", ["a"], ["c"])]
    proto.functions.append(helper.make_function("own", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 20)]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    fails(tmp_path / "m.onnx", "output 'b' of function own::F")


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


# Saving


def lazy(name: str, shape: tuple[int, ...], make: object) -> ir.Value:
    tensor = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(shape), name=name)  # type: ignore[arg-type]
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def test_small_models_are_one_file(tmp_path: Path) -> None:
    saved = io.save(ir.from_proto(linear(extra=3)), tmp_path / "out", name="m.onnx")
    assert saved == tmp_path / "out" / "m.onnx"
    assert [p.name for p in saved.parent.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(onnx.load(saved))


def test_large_models_have_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.io.saving.SINGLE_FILE_BYTES", 8000)
    saved = io.save(ir.from_proto(linear(extra=3)), tmp_path / "out")
    assert sorted(files(saved.parent)) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(saved))
    stored = onnx.load(saved, load_external_data=False).graph.initializer
    assert [t.name for t in stored if t.data_location == TensorProto.EXTERNAL] == ["w", "e0", "e1", "e2"]
    assert (saved.parent / "model.onnx.data").stat().st_size == 8192 + 3 * 4096


def test_shards(tmp_path: Path) -> None:
    saved = io.save(ir.from_proto(linear(extra=3)), tmp_path / "out", max_shard_size=8192, max_workers=3)
    sizes = {p.name: p.stat().st_size for p in saved.parent.iterdir() if p.suffix == ".data"}
    assert sizes == {
        "model.onnx-00001-of-00003.data": 8192,
        "model.onnx-00002-of-00003.data": 8192,
        "model.onnx-00003-of-00003.data": 4096,
    }
    assert content(io.load(saved)) == content(ir.from_proto(linear(extra=3)))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for run, workers in enumerate((1, 4)):
        model = ir.from_proto(linear(extra=20))
        model.graph.register_initializer(lazy("z", (64, 64), lambda: ir.Tensor(np.full((64, 64), 7, np.float32))))
        io.save(model, tmp_path / str(run), max_shard_size=1 << 15, max_workers=workers, memory=4096)
        written.append(files(tmp_path / str(run)))
    assert written[0] == written[1]


def test_saving_computes_each_lazy_tensor_once_and_changes_nothing(tmp_path: Path) -> None:
    computed: list[str] = []

    def make(name: str, shape: tuple[int, ...]) -> object:
        def evaluate() -> ir.Tensor[np.ndarray]:
            computed.append(name)
            return ir.Tensor(np.full(shape, 3, np.float32))

        return evaluate

    for shards in (None, 1 << 20):
        computed.clear()
        model = ir.from_proto(linear())
        shapes = {"codes": (64, 64), "scales": (64, 8), "zeros": (4,)}
        for name, shape in shapes.items():
            model.graph.register_initializer(lazy(name, shape, make(name, shape)))
        model.graph.register_initializer(ir.Value(name="alias", const_value=model.graph.initializers["w"].const_value))
        before = [(s.label, s.tensor) for s in stored_tensors(model)]
        saved = io.save(model, tmp_path / str(shards), max_shard_size=shards, max_workers=1)
        assert computed == ["codes", "scales", "zeros"]
        assert [(s.label, s.tensor) for s in stored_tensors(model)] == before
        stored = io.load(saved).graph.initializers
        assert list(stored)[2:] == ["codes", "scales", "zeros", "alias"]
        for name, shape in shapes.items():
            tensor = stored[name].const_value
            assert tensor is not None and np.array_equal(tensor.numpy(), np.full(shape, 3))
            assert isinstance(tensor, MappedTensor) == (shards is not None)


@pytest.mark.parametrize("shards", [None, 1 << 20])
def test_a_failing_tensor_leaves_nothing_and_comes_through(tmp_path: Path, shards: int | None) -> None:
    def fail() -> ir.Tensor[np.ndarray]:
        raise QuantizationError("weight 'w' is not finite")

    model = ir.from_proto(linear(extra=5))
    model.graph.register_initializer(lazy("q", (64, 64), fail))
    with pytest.raises(QuantizationError, match="'w' is not finite"):
        io.save(model, tmp_path / "new" / "out", max_shard_size=shards, max_workers=4)
    assert list(tmp_path.iterdir()) == []
    kept = io.save(ir.from_proto(linear()), tmp_path / "out").read_bytes()
    with pytest.raises(QuantizationError):
        io.save(model, tmp_path / "out", max_shard_size=shards, overwrite=True)
    assert files(tmp_path / "out") == {"model.onnx": kept}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_output_is_refused_or_swapped(tmp_path: Path) -> None:
    model, out = ir.from_proto(linear()), tmp_path / "out"
    out.mkdir()
    io.save(model, out)
    with pytest.raises(UsageError, match="--overwrite"):
        io.save(model, out)
    io.save(model, out, name="other.onnx", overwrite=True)
    assert list(files(out)) == ["other.onnx"]
    (out / "other.onnx").rename(out / "notes.txt")
    with pytest.raises(UsageError, match=r"holds no \.onnx file"):
        io.save(model, out, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        io.save(model, out / "notes.txt", overwrite=True)
    with pytest.raises(UsageError, match="part of the path is a file"):
        io.save(model, out / "notes.txt" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_input_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path / "a" / "in")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = files(path.parent)
    model = io.load(path)
    for out in (path.parent, tmp_path / "a", tmp_path / "link", tmp_path / "link" / "in"):
        with pytest.raises(UsageError, match="holds the input"):
            io.save(model, out, overwrite=True)
    io.save(model, path.parent / "below")
    shutil.rmtree(path.parent / "below")
    assert files(path.parent) == before
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="working directory"):
        io.save(ir.from_proto(linear()), tmp_path, overwrite=True)


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_proto(linear())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="free some space"):
        io.save(model, tmp_path / "out")
    monkeypatch.undo()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="permission denied"):
        io.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"memory": 0}, {"max_workers": 0}, {"max_shard_size": 0}, {"name": "a/b.onnx"}])
def test_wrong_options(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        io.save(ir.from_proto(linear()), tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
import numpy as np, onnx_ir as ir
from rewriter import io
model = io.load(sys.argv[1])
def wait():
    print("writing", flush=True)
    time.sleep(60)
tensor = ir.LazyTensor(wait, ir.DataType.FLOAT, ir.Shape([64, 64]), name="slow")
model.graph.register_initializer(ir.Value(name="slow", const_value=tensor))
io.save(model, sys.argv[2], max_shard_size=1 << 20)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="leftovers are kept where there are no locks")
def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path, out = external(tmp_path / "in"), tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(io.__file__).parent.parent)}
    command = [sys.executable, "-c", KILLED, str(path), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None and run.stdout.readline() == b"writing\n"
        partial = [p.name for p in tmp_path.iterdir() if p.name != "in"]
        assert partial == [f".out.partial-{run.pid}"]
        io.save(ir.from_proto(linear()), out)  # a run that goes on is left alone
        assert (tmp_path / partial[0]).exists()
        shutil.rmtree(out)
        run.send_signal(signal.SIGKILL)
    assert not out.exists() and (tmp_path / partial[0]).exists()
    io.save(ir.from_proto(linear()), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_an_output_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    io.save(ir.from_proto(linear()), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old-1")
    with pytest.raises(ModelError):
        io.load(tmp_path / "out")
    io.save(ir.from_proto(linear()), tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shards", [None, 1 << 14])
def test_progress_counts_bytes(tmp_path: Path, shards: int | None) -> None:
    seen: list[tuple[int, int]] = []
    model = ir.from_proto(linear())
    for index in range(9):
        model.graph.register_initializer(lazy(f"l{index}", (999,), lambda: ir.Tensor(np.ones(999, np.float32))))
    io.save(model, tmp_path / "out", max_shard_size=shards, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen)) and len(seen) > 9
    assert seen[-1] == (total_bytes(model), total_bytes(model))


def test_other_files_are_copied(tmp_path: Path) -> None:
    path = external(tmp_path / "in")
    for name in ("genai_config.json", "tokenizer.json", ".hidden"):
        (path.parent / name).write_text(name)
    (path.parent / "vision.onnx").write_bytes(linear().SerializeToString())
    io.save(io.load(path), tmp_path / "package", copy_others_from=path)
    assert list(files(tmp_path / "package")) == ["genai_config.json", "model.onnx", "tokenizer.json", "vision.onnx"]
    with pytest.raises(UsageError, match="another name"):
        io.save(io.load(path), tmp_path / "clash", name="vision.onnx", copy_others_from=path)
    (path.parent / "genai_config.json").unlink()
    io.save(io.load(path), tmp_path / "single", copy_others_from=path)
    assert list(files(tmp_path / "single")) == ["model.onnx", "tokenizer.json"]


def test_to_proto_holds_everything(tmp_path: Path) -> None:
    model = io.load(external(tmp_path / "in"))
    model.graph.register_initializer(lazy("q", (4,), lambda: ir.Tensor(np.ones(4, np.float32))))
    proto = io.to_proto(model)
    assert all(t.data_location == TensorProto.DEFAULT for t in proto.graph.initializer)
    assert np.array_equal(numpy_helper.to_array(proto.graph.initializer[2]), np.ones(4))
    assert isinstance(model.graph.initializers["w"].const_value, MappedTensor)
    big = lazy("big", (1 << 30,), lambda: pytest.fail("computed before its size was looked at"))
    model.graph.register_initializer(big)
    with pytest.raises(ModelError, match="2 GB"):
        io.to_proto(model)


@pytest.mark.skipif("REWRITER_LARGE_TESTS" not in os.environ, reason="writes 3 GB; set REWRITER_LARGE_TESTS to run it")
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    model = ir.from_proto(linear())
    for index in range(3):
        shape = (1 << 28,)
        model.graph.register_initializer(lazy(f"l{index}", shape, lambda: ir.Tensor(np.ones(1 << 28, np.float32))))
    started = time.monotonic()
    saved = io.load(io.save(model, tmp_path / "out", max_workers=1))
    assert saved.graph.initializers["l2"].const_value.numpy()[-1] == 1  # type: ignore[union-attr]
    assert time.monotonic() - started < 120
