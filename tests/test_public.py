"""The doors in Python: everything that the command line does is a function of ``rewriter``, on every kind of model."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

import rewriter
from rewriter import io
from rewriter.api import Options

MODEL = Path(__file__).parent / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"


@dataclasses.dataclass
class Exported:
    """What ``torch.onnx.export`` returns, as far as it matters here."""

    model: ir.Model


KINDS = {
    "path": lambda: str(MODEL),
    "message": lambda: onnx.load(MODEL),
    "onnx_ir": lambda: io.load(MODEL),
    "exported": lambda: Exported(io.load(MODEL)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_door_takes_every_kind_of_model(kind):
    given = KINDS[kind]()
    info = rewriter.inspect(given)
    assert (info.layers, len(info.blocks)) == (2, 2)
    report = rewriter.explain(given)
    assert report.applied["fuse-experts"] == 2 and not report.proofs
    result = rewriter.apply(given, "unstack")
    assert rewriter.check(given, result.model).relative_l2 < 1e-6


def test_the_model_that_comes_back_is_of_the_kind_that_went_in():
    assert isinstance(rewriter.apply(onnx.load(MODEL), "unstack").model, onnx.ModelProto)
    for kind in ("path", "onnx_ir", "exported"):
        assert isinstance(rewriter.apply(KINDS[kind](), "unstack").model, ir.Model)


def test_the_types_say_so_too():
    returned = [typing.get_type_hints(one)["return"] for one in typing.get_overloads(rewriter.apply)]
    kinds = [typing.get_args(one)[0] for one in returned]
    assert kinds == [onnx.ModelProto, ir.Model, typing.Any]
    options = [p.name for p in inspect.signature(rewriter.apply).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert list(Options.__annotations__) == options


def test_what_concerns_one_name():
    found = rewriter.explain(MODEL, "lm_head.weight_t")
    assert {a.rule for a in found.applications} == {"matmul-to-matmul-nbits"}
    with pytest.raises(rewriter.UsageError, match="did you mean"):
        rewriter.explain(MODEL, "lm_head.weight")


def test_what_is_no_model_is_refused():
    for door in (rewriter.inspect, rewriter.explain, rewriter.apply):
        with pytest.raises(rewriter.UsageError, match="a model is a path"):
            door(3)


def test_every_public_name_is_there():
    assert {*rewriter.__all__} <= {*dir(rewriter)}
    assert all(getattr(rewriter, name) is not None for name in rewriter.__all__)
    assert rewriter.__version__ == "0.2.0"
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        rewriter.aply  # noqa: B018


def test_the_shipped_rules_clash_with_no_package_of_that_name(tmp_path):
    """django-rules, for one, installs a top-level ``rules``; it may come before or after."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "__init__.py").write_text("other = True\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import rules; assert rules.other\n"
        "from rewriter.ruleset.discover import rule_offers, set_offers\n"
        "import rewriter; rewriter.load('moe-int4')\n"
        "assert {o.package for o in (*rule_offers().values(), *set_offers().values())} == {'rewriter.rules'}\n"
        "assert rules is sys.modules['rules'] and rules.other"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
