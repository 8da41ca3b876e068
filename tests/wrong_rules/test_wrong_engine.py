"""What was proved is what was written: mistakes of the engine between the two are caught, and nothing appears."""

from __future__ import annotations

import pytest
from mistakes import made
from wrong_engine import ENGINE, MODELS

import rewriter
from rewriter.errors import RewriterError


def written(name, folder, *, sharded):
    model, rules = MODELS[name]
    result = rewriter.apply(model(), rules, strict=True)
    assert result.report.applications
    return result.save(folder, **({"max_shard_size": 1 << 30} if sharded else {}))


@pytest.mark.parametrize("wrong", ENGINE, ids=lambda w: w.mistake.name)
def test_a_mistake_of_the_engine_is_caught_and_nothing_is_written(wrong, tmp_path):
    with made(wrong.mistake) as changed, pytest.raises(RewriterError, match=wrong.caught):
        assert changed
        written(wrong.model, tmp_path / "out", sharded=wrong.sharded)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_right_engine_writes_the_same_models(name, sharded, tmp_path):
    assert written(name, tmp_path / "out", sharded=sharded).exists()
