"""Loading puts real models before us and refuses bad files in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from io_models import MODELS, content, fails, linear
from onnx import helper, numpy_helper

from rewriter import io

INVALID = {"gemma4_fused_moe_pre324_malformed_f32", "gpt_oss_decomposed_dml_fp32"}
VALID = sorted(p for p in MODELS.rglob("*.onnx") if p.stem not in INVALID)


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
    fails("a" * 300, "cannot be read", "File name too long")
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
