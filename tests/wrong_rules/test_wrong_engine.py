"""What was proved is what was written: mistakes of the engine are caught, and nothing appears, or it is said."""

from __future__ import annotations

import pytest
from mistakes import made
from onnx.checker import ValidationError
from wrong_engine import ENGINE, MODELS, UNIT

import rewriter
from rewriter.errors import ParityError, RewriterError
from rewriter.parity.expected import expected_l2
from rewriter.parity.limits import exceeded


def written(name, folder, *, sharded, compared=False):
    model, rules = MODELS[name]
    result = rewriter.apply(model(), rules, strict=True)
    assert result.report.applications
    file = result.save(folder, **({"max_shard_size": 1 << 30} if sharded else {}))
    if compared:
        most = expected_l2(result.ir_model, result.report.weights, quantized=bool(result.report.weights))
        if failures := exceeded(result.check(), result.rule_set.parity, most):
            raise ParityError(failures[0])
    return file


@pytest.mark.parametrize("wrong", ENGINE, ids=lambda w: w.mistake.name)
def test_a_mistake_of_the_engine_is_caught_and_nothing_is_written(wrong, tmp_path):
    with made(wrong.mistake) as changed, pytest.raises(RewriterError, match=wrong.caught):
        assert changed
        written(wrong.model, tmp_path / "out", sharded=wrong.sharded, compared=wrong.compared)
    assert wrong.compared or not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", UNIT, ids=lambda w: w.mistake.name)
def test_a_mistake_that_no_run_need_show_is_caught_by_a_check_of_its_part(wrong):
    wrong.check()
    with made(wrong.mistake) as changed:
        assert changed
        with pytest.raises((AssertionError, RewriterError, ValidationError, ValueError)):
            wrong.check()


def test_there_are_as_many_as_were_tried():
    assert len({wrong.mistake.name for wrong in ENGINE}) == 31


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_right_engine_writes_the_same_models(name, sharded, tmp_path):
    assert written(name, tmp_path / "out", sharded=sharded, compared=True).exists()
