"""Where models are found and go to: repositories of the Hub, its cache, packages of ONNX Runtime GenAI."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from io_models import external

import rewriter
from rewriter import io
from rewriter.cli import main
from rewriter.errors import ModelError

MODELS = Path(__file__).parents[1] / "models" / "mobius"
GRANITE = MODELS / "granitemoehybrid_static_unroll_f32.onnx"
DENSE = MODELS / "llama_tied_dense_f32.onnx"


def test_a_repository_has_its_model_in_onnx(tmp_path):
    repository = tmp_path / "repository"
    (repository / "onnx").mkdir(parents=True)
    shutil.copy(GRANITE, repository / "onnx" / "model.onnx")
    (repository / "config.json").write_text("{}")
    (repository / "model.safetensors").write_bytes(b"weights")
    assert io.load(repository).graph.outputs[0].name == "logits"
    (repository / "onnx" / "model_q4.onnx").write_bytes(b"a variant")
    rewriter.apply(repository, "unstack").save(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"model.onnx", "config.json"}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    (repository / "onnx" / "vision.onnx").write_bytes(b"another model")
    with pytest.raises(ModelError, match="holds several models"):
        io.load(repository)


def test_of_a_genai_package_the_decoder_is_meant(tmp_path):
    for name in ("decoder", "vision"):
        shutil.copy(GRANITE, tmp_path / f"{name}.onnx")
    with pytest.raises(ModelError, match="holds several models"):
        io.load(tmp_path)
    config = {"model": {"decoder": {"filename": "decoder.onnx"}, "vision": {"filename": "vision.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    assert io.source_path(io.load(tmp_path)).name == "decoder.onnx"
    rewriter.apply(tmp_path, "unstack").save(tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"decoder.onnx", "vision.onnx", "genai_config.json"}


def test_each_model_of_a_genai_package_is_rewritten_by_rules_of_its_own(tmp_path):
    source, output = tmp_path / "exported", tmp_path / "int4"
    source.mkdir()
    models = {"decoder": GRANITE, "vision": DENSE, "embedding": DENSE}
    for name, model in models.items():
        shutil.copy(model, source / f"{name}.onnx")
    config = {"model": {name: {"filename": f"{name}.onnx"} for name in models}}
    (source / "genai_config.json").write_text(json.dumps(config))
    rewriter.apply(source, "moe-int4").save(output)
    written = {"decoder.onnx": _bits(output / "decoder.onnx")}
    assert written["decoder.onnx"] == {4}
    for name, rules, bits in (("vision", "dense-int4", 4), ("embedding", "moe-int8", 8)):
        to = ["-o", str(output / f"{name}.onnx"), "--rules", rules, "--overwrite", "--no-check"]
        assert main(["apply", str(source / f"{name}.onnx"), *to]) == 0
        written[f"{name}.onnx"] = {bits}
        assert {file: _bits(output / file) for file in written} == written, "the others stay as they were written"
    assert {file.name for file in output.iterdir()} == {*written, "genai_config.json"}


def _bits(path):
    linears = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    return {onnx.helper.get_node_attr_value(node, "bits") for node in linears}


def test_links_of_the_hubs_cache_are_followed_into_its_own_blobs(tmp_path):
    path = external(tmp_path / "m")
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123" / "onnx"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file, blob in ((path, "aa"), (path.parent / "w.data", "bb")):
        shutil.copy(file, repository / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../../blobs") / blob)
    model = io.load(snapshot)
    assert model.graph.initializers["w"].const_value.numpy().size
    shutil.copy(path.parent / "w.data", tmp_path / "outside")
    (snapshot / "w.data").unlink()
    (snapshot / "w.data").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match="is outside the model's directory"):
        io.load(snapshot)


def test_what_is_no_onnx_is_said_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"\x18\x00\x00\x00ORTM" + bytes(64))
    with pytest.raises(ModelError, match=r"ONNX Runtime's own format \(\.ort\)"):
        io.load(tmp_path / "m.onnx")
    path = external(tmp_path / "m")
    (path.parent / "w.data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(ModelError, match="Git LFS pointer: run git lfs pull"):
        io.load(path)
    with pytest.raises(ModelError, match="optimum-cli export onnx --model Qwen/Qwen3-30B-A3B Qwen3-30B-A3B"):
        io.load("Qwen/Qwen3-30B-A3B")


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ((), {"model.onnx", "model.onnx_data"}),
        (("--max-shard-size", "40kB"), {"model.onnx", "model.onnx_data", "model.onnx_data_1", "model.onnx_data_2"}),
    ],
)
def test_the_data_file_has_the_name_that_others_look_for(tmp_path, options, files):
    out = tmp_path / "out"
    arguments = ["apply", str(GRANITE), "-o", str(out / "model.onnx"), "--data-name", "model.onnx_data", "-q"]
    assert main([*arguments, "--no-check", "--parity", "none", *options]) == 0
    assert {file.name for file in out.iterdir()} == files
    onnx.load(out / "model.onnx")
    assert main([*arguments, "--data-name", "a/b", "--overwrite"]) == 2
