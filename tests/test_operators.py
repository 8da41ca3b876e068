"""An operator is named in its own module alone."""

import ast
from pathlib import Path

import pytest

from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.qmoe import QMOE

ROOT = Path(__file__).parents[1]
OPERATORS = (*EXPERTS, MATMUL_NBITS, GATHER_BLOCK_QUANTIZED)


def literals(file):
    """The texts of a module that are no docstring."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_an_operator_is_named_by_its_own_module(operator):
    files = [file for room in ("rewriter", "rules") for file in (ROOT / room).rglob("*.py")]
    own = ROOT / "rewriter" / "operators"
    named = {str(f.relative_to(ROOT)) for f in files if own not in f.parents and operator.name in literals(f)}
    assert not named
    assert any(operator.name in literals(f) for f in own.rglob("*.py"))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_definition_is_what_the_installed_runtime_declares(operator):
    binding = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    schema = next(
        s for s in binding.get_all_operator_schema() if (s.domain, s.name) == ("com.microsoft", operator.name)
    )
    assert set(operator.attributes) <= set(schema.attributes)
    names = [name.rstrip("?") for name in operator.inputs]
    assert names == [formal.name for formal in schema.inputs][: len(names)]
    required = [not name.endswith("?") for name in operator.inputs]
    single = [formal.option == binding.schemadef.OpSchema.FormalParameterOption.Single for formal in schema.inputs]
    if operator is not QMOE:  # its schema leaves out scales, which integers need
        assert required == single[: len(names)]
    for slots in getattr(operator, "projections", ()):
        assert names[slots.weight] == f"{slots.name}_experts_weights"
        assert names[slots.bias] == f"{slots.name}_experts_bias"
        assert slots.scales is None or names[slots.scales] == f"{slots.name}_scales"
        assert slots.zero_points is None or names[slots.zero_points] == f"{slots.name}_zero_points"
        assert slots.global_scale is None or names[slots.global_scale] == f"{slots.name}_global_scale"
