"""What is asked of ONNX Runtime for a model that runs once."""

import threading

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter.errors import TargetError
from rewriter.parity import sessions

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[t, 3] x) => (float[t, 2] y) <float[2, 3] w> { turned = Transpose(w) y = MatMul(x, turned) }"""


def message(body):
    """A model of one input, as the worker takes it."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[t, 3] x) => (float[t, 3] y) {{ {body} }}'
    )
    return np.frombuffer(proto.SerializeToString(), np.uint8)


@pytest.fixture
def model(tmp_path):
    weight = ir.tensor(np.arange(6, dtype=np.float32).reshape(2, 3), name="w")
    ir.save(ir.from_onnx_text(TEXT, initializers=[weight]), tmp_path / "model.onnx")
    return str(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("most", "once", "asked"), [(-1, True, ["ConstantFolding"]), (-1, False, None), (1 << 20, True, None)]
)
def test_large_weights_are_folded_only_for_a_model_that_runs_often(model, monkeypatch, most, once, asked):
    ort = pytest.importorskip("onnxruntime")
    given, real = [], ort.InferenceSession

    def session(*arguments, disabled_optimizers=None, **options):
        given.append(disabled_optimizers)
        return real(*arguments, disabled_optimizers=disabled_optimizers, **options)

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(sessions, "_FOLDED", most)
    settings, feeds = sessions.Settings("cpu"), {"x": np.ones((1, 3), np.float32)}
    if once:
        found = sessions.run(settings, model, feeds)
    else:
        found = sessions.run_loaded(sessions.load(settings, model), feeds, None)
    assert given == [asked]
    np.testing.assert_array_equal(found["y"], [[3, 12]])


def test_what_only_folding_makes_runnable_is_folded(model, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    real = ort.InferenceSession

    def session(*arguments, disabled_optimizers=None, **options):
        if disabled_optimizers:
            raise ValueError("needs a constant")
        return real(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(sessions, "_FOLDED", -1)
    feeds = {"x": np.ones((1, 3), np.float32)}
    np.testing.assert_array_equal(sessions.run(sessions.Settings("cpu"), model, feeds)["y"], [[3, 12]])
    with pytest.raises(TargetError):
        sessions.run(sessions.Settings("cpu"), f"{model}.absent", feeds)


@pytest.mark.parametrize("bytes_", [-1, 1 << 30])
def test_two_models_give_the_same_side_by_side(monkeypatch, bytes_):
    monkeypatch.setattr(sessions, "_SIDE_BY_SIDE", bytes_)
    threads, real = [], sessions.run_each

    def seen(*arguments):
        threads.append(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(sessions, "run_each", seen)
    settings, right, wrong = sessions.Settings("cpu"), {"x": np.ones((2, 3), np.float32)}, {"x": np.ones(3, np.int64)}
    first, second = (message(f"y = {operator}(x)") for operator in ("Neg", "Abs"))
    ran, refused = sessions.run_both(settings, (first, [right, wrong]), (second, [right, wrong]))
    assert (ran[0]["y"] == -1).all() and (ran[1]["y"] == 1).all()
    assert isinstance(refused[0], TargetError) and refused[0] is refused[1]
    assert len(set(threads)) == (2 if bytes_ < 0 else 1)
    first_alone = sessions.run_both(settings, (first, [right]), (message("y = Absent(x)"), [right]))
    assert (first_alone[0][0]["y"] == -1).all() and isinstance(first_alone[0][1], TargetError)
    with pytest.raises(TargetError, match="cannot load"):
        sessions.run_both(settings, (message("y = Absent(x)"), [right]), (second, [right]))
