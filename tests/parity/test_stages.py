"""A model cut into parts computes what it computes whole, with no more constants in a part than are allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support import parse

from rewriter import io
from rewriter.graph.contents import total_bytes
from rewriter.parity.model_inputs import random_inputs
from rewriter.parity.runs import GivenRuns, run_many
from rewriter.parity.runtime import OrtRuntime
from rewriter.parity.stages import stages

MODELS = Path(__file__).parents[1] / "models"
FILES = (
    "genai/gpt_oss_fp32_cpu",
    "hf_exporter/qwen3_moe__default",
    "mobius/granitemoehybrid_static_unroll_f32",
    "torch_unroll/getitem_linear__dynamo18_raw",
)


def runs_of(model, count=2):
    return GivenRuns([random_inputs(model, seed, sequence=9 + seed) for seed in range(count)])


def whole(model, runs, values):
    proto = io.to_proto(model)
    found = [OrtRuntime().run(proto, runs.feeds(index)) for index in range(len(runs))]
    return {(index, name): run[name] for index, run in enumerate(found) for name in values}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 5])
def test_the_parts_compute_what_the_whole_does(name, share):
    model = io.load(MODELS / f"{name}.onnx")
    runs = runs_of(model)
    most = total_bytes(model) // share if share else 0
    parts = list(stages(model, set(model.graph.outputs), most))
    assert len(parts) >= max(share, 3)
    values = list(model.graph.outputs)
    expected = whole(model, runs, [value.name for value in values])
    told = []
    found = {
        (index, name): array
        for index, name, array in run_many(
            model, model, runs, values, OrtRuntime(), memory=4 * most, progress=lambda *now: told.append(now)
        )
    }
    assert found.keys() == expected.keys()
    for key, array in found.items():
        np.testing.assert_allclose(array, expected[key], rtol=1e-3, atol=1e-4 * np.abs(expected[key]).max(initial=1e-9))
    assert told[-1] == (2 * len(parts), 2 * len(parts))


def test_a_part_holds_no_more_than_is_allowed():
    model = io.load(MODELS / "hf_exporter/qwen3_moe__default.onnx")
    largest = max(t.const_value.nbytes for t in model.graph.initializers.values())
    for part in stages(model, set(model.graph.outputs), 2 * largest):
        assert total_bytes(part.model) <= 3 * largest


def test_it_cuts_where_the_least_crosses():
    """Between two layers one value crosses; inside of each there are four."""
    layers = "".join(
        f"a{i} = MatMul({x}, w{i}) b{i} = Relu({x}) c{i} = Neg({x}) d{i} = Abs({x}) e{i} = MatMul(a{i}, w{i})"
        f" f{i} = Add(e{i}, b{i}) g{i} = Add(f{i}, c{i}) {y} = Add(g{i}, d{i})\n"
        for i, (x, y) in enumerate((("x", "r0"), ("r0", "r1"), ("r1", "y")))
    )
    model = parse(
        f"agraph (float[T, 4] x, float[4, 4] w0, float[4, 4] w1, float[4, 4] w2) => (float[T, 4] y) {{ {layers} }}"
    )
    for name in ("w0", "w1", "w2"):
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.eye(4, dtype=np.float32), name=name)
        model.graph.initializers.add(value)
    parts = list(stages(model, set(model.graph.outputs), 64))
    assert [part.carried for part in parts] == [(), ("r0",), ("r1",)]
    assert [part.done for part in parts] == [(), ("r0",), ("r1",)]


def test_a_body_reads_what_is_carried():
    model = parse(
        """agraph (float[2, 2] x, bool c) => (float[2, 2] y) {
            a = Mul(x, x) b = MatMul(a, w) z = If (c) <
                then_branch = yes () => (float[2, 2] t) { t = Add(a, b) },
                else_branch = no () => (float[2, 2] e) { e = MatMul(b, v) }
            > y = Neg(z) }""".replace(
            "(float[2, 2] x, bool c)", "(float[2, 2] x, bool c, float[2, 2] w, float[2, 2] v)"
        )
    )
    runs = GivenRuns(
        [
            {
                "x": np.ones((2, 2), np.float32),
                "c": np.array(c),
                "w": np.eye(2, dtype=np.float32),
                "v": np.eye(2, dtype=np.float32),
            }
            for c in (True, False)
        ]
    )
    values = [
        model.graph.outputs[0],
        next(n for n in model.graph if n.op_type == "Mul").outputs[0],
        model.graph.inputs[0],
    ]
    found = {(i, name): array for i, name, array in run_many(model, model, runs, values, OrtRuntime(), memory=0)}
    np.testing.assert_array_equal(found[0, "y"], -(1 + np.ones((2, 2))))
    np.testing.assert_array_equal(found[1, "y"], -np.ones((2, 2)))
    assert found[0, "x"].shape == found[1, "a"].shape == (2, 2)
