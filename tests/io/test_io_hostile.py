"""Models that no exporter writes: each is rewritten, left alone or refused in one line, and nothing else happens."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from hostile_models import BYTES, HOSTILE, plain

import rewriter
from rewriter import io
from rewriter.errors import ModelError, RewriterError


def rewrite(folder: Path, data: bytes) -> str:
    """Rewrites and writes a model; returns why it was refused, or nothing."""
    (folder / "model.onnx").write_bytes(data)
    (folder / "w.data").write_bytes(bytes(8192))
    try:
        rewriter.apply(folder / "model.onnx", "rtn", overrides={"parity.local": "none"}).save(folder / "out")
    except RewriterError as error:
        assert not (folder / "out").exists()
        return str(error)
    return ""


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_model_is_one_line_or_a_model(tmp_path: Path, kind: str) -> None:
    model = plain()
    HOSTILE[kind](model)
    refused = rewrite(tmp_path, model.SerializeToString())
    assert "\n" not in refused and len(refused) < 4100
    if not refused:
        io.load(tmp_path / "out")


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_model_are_one_line_or_a_model(tmp_path: Path, kind: str) -> None:
    refused = rewrite(tmp_path, BYTES[kind])
    assert "\n" not in refused and len(refused) < 4100


@pytest.mark.parametrize("every", range(7))
def test_a_byte_flipped_anywhere_is_one_line_or_a_model(tmp_path: Path, every: int) -> None:
    data = plain().SerializeToString()
    weights = data.index(plain().graph.initializer[0].raw_data[:64])
    places = [*range(weights), *range(weights + 8192, len(data))]
    for index, place in enumerate(places[every::7]):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (index % 8)
        (tmp_path / "model.onnx").write_bytes(flipped)
        try:
            io.load(tmp_path / "model.onnx")
        except ModelError as error:
            assert "\n" not in str(error)


REFUSED = {
    "a negative dimension": "which no array has",
    "typed doubles as float": "has its elements in double_data, where float_data holds them",
    "a location with NUL": "has a NUL in its name",
    "text as an external tensor": "strings cannot be external data",
    "an attribute without a type": "says no type",
    "an opset to come": "has no version that there is",
    "an input of 2^62 rows": "which no array has; export the model with names for sizes that vary",
    "an input of 1,000 dimensions": "which no array has",
    "functions that call the next twice, 30 deep": "2,000,000 are the most that are read",
    "a function that calls itself": "calls itself",
}


@pytest.mark.parametrize(("kind", "words"), REFUSED.items(), ids=REFUSED.keys())
def test_what_is_refused_says_why(tmp_path: Path, kind: str, words: str) -> None:
    model = plain()
    HOSTILE[kind](model)
    assert words in rewrite(tmp_path, model.SerializeToString())


def test_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    for kind in BYTES:
        if "UTF-8" in kind:
            assert "not text" in rewrite(tmp_path, BYTES[kind])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(ModelError, match="is not a regular file"):
            io.load(path)
    with pytest.raises(ModelError, match="there is no file"):
        io.load("a\0b.onnx")


def test_nodes_in_reverse_order_are_put_in_order(tmp_path: Path) -> None:
    """Of ten thousand: what takes the square of their number would not come to an end here."""
    count = 10_000
    nodes = [onnx.helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(count)]
    ends = [onnx.helper.make_tensor_value_info(f"v{i}", onnx.TensorProto.FLOAT, [2]) for i in (0, count)]
    graph = onnx.helper.make_graph(nodes[::-1], "g", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    result = rewriter.apply(tmp_path / "model.onnx", "rtn")
    onnx.checker.check_model(onnx.load(result.save(tmp_path / "out")))
