"""Saving streams: each tensor is computed once, written, and dropped."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from io_models import content, external, files, lazy, linear
from onnx import TensorProto, numpy_helper

import rewriter
from rewriter import io
from rewriter.errors import ModelError, QuantizationError, UsageError
from rewriter.graph.contents import stored_tensors, total_bytes
from rewriter.io import writes
from rewriter.quantize import ALGORITHMS, QuantizedWeight, Quantizer, WeightContext
from rewriter.quantize.job import PartTensor
from rewriter.tensors import MappedTensor


def test_small_models_are_one_file(tmp_path: Path) -> None:
    saved = io.save(ir.from_proto(linear(extra=3)), tmp_path / "out", name="m.onnx")
    assert saved == tmp_path / "out" / "m.onnx"
    assert [p.name for p in saved.parent.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(onnx.load(saved))


def test_one_file_has_the_bytes_of_the_whole_message_and_its_weights_are_never_held_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = linear(extra=3)
    sizes = {"one": (300, 300), "twice": (4, 4), "bits": (6, 3), "none": (0, 2), "long": (1, 1 << 14)}
    arrays = {name: ir.Tensor(np.full(shape, 7, np.float32), name=name) for name, shape in sizes.items()}
    arrays["bits"] = ir.Tensor(np.ones((6, 3), ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="bits")
    made = {
        name: ir.LazyTensor(lambda array=array: array, array.dtype, array.shape, name=name)
        for name, array in arrays.items()
    }
    first, second = ir.from_proto(proto), ir.from_proto(proto)
    for model, tensors in ((first, arrays), (second, made)):
        model.metadata_props["a key"] = "after the graph"
        for name, tensor in tensors.items():
            model.graph.register_initializer(ir.Value(name=name, const_value=tensor))
        model.graph.register_initializer(ir.Value(name="again", const_value=tensors["twice"]))
    expected = ir.to_proto(first).SerializeToString(deterministic=True)
    asked = []
    real = io.saving.ir.to_proto
    monkeypatch.setattr(io.saving.ir, "to_proto", lambda model: asked.append(real(model)) or asked[-1])
    assert io.save(second, tmp_path / "out").read_bytes() == expected
    assert sum(len(tensor.raw_data) for tensor in asked[0].graph.initializer if tensor.name in ("one", "long")) == 0


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


@pytest.mark.parametrize(
    "arguments", [{"memory": 0}, {"memory": "1"}, {"max_workers": 0}, {"max_shard_size": 0}, {"name": "a/b.onnx"}]
)
def test_wrong_options(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        io.save(ir.from_proto(linear()), tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


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
    (path.parent / "genai_config.json").write_text('{"decoder": {"filename": "model.onnx"}}')
    with pytest.raises(UsageError, match=r"names 'model.onnx', so the output must too"):
        io.save(io.load(path), tmp_path / "named", name="decoder.onnx", copy_others_from=path)
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


def test_weights_that_may_take_long_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all cores have some; quick ones of a stack are written together."""
    monkeypatch.setattr(writes, "SLOWER", writes.STEP)

    def own(weight: Any, context: WeightContext) -> QuantizedWeight:
        return ALGORITHMS["rtn"](weight, context)

    def most(quantizer: Quantizer | None) -> int:
        model = "tests/models/mobius/qwen3_moe_dense_experts_f32.onnx"
        result = rewriter.apply(model, "rtn", quantizer=quantizer, overrides={"parity.local": "none"})
        slots = [slot for slot in stored_tensors(result.model) if isinstance(slot.tensor, PartTensor)]
        return max(len(write.jobs) for write in writes.plan(slots, lambda index, count: "w.data", None).writes)

    assert (most(None), most(own)) == (4, 1)
