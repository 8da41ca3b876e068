"""div-to-mul: exact, or left alone."""

import onnx_ir as ir
import pytest
from example_rules.div_to_mul import rule
from hypothesis import strategies as st

from rewriter.testing import check_model, package_tests


def division(divisor="8", *, dtype="float", shape="", body="y = Div(x, c)"):
    """A model that divides x by a constant c."""
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>'
        f"g ({dtype}[T, 2] x, {dtype}[2] d) => ({dtype}[T, 2] y) <{dtype}{shape} c = {{{divisor}}}> {{ {body} }}"
    )


@st.composite
def divisions(draw):
    """Draws models with one to three divisions: by constants, by an input, of a constant."""
    divisor = draw(st.sampled_from(["8", "0.5", "-4", "3", "0", "1e-6"]))
    operands = st.sampled_from(["x, c", "x, d", "c, x"])
    divided = [f"y{i} = Div({draw(operands)})" for i in range(draw(st.integers(1, 3)))]
    total = f"y = Sum({', '.join(f'y{i}' for i in range(len(divided)))})"
    return division(divisor, dtype=draw(st.sampled_from(["float", "double"])), body="\n".join([*divided, total]))


test_rules = package_tests("example_rules", models={"div-to-mul": divisions()})


def test_it_fires():
    report = check_model(rule(), division("2, 8", shape="[2]"))
    assert report.applied == {"div-to-mul": 1}


@pytest.mark.parametrize("divisor", ["3", "0"])
def test_a_divisor_whose_reciprocal_is_rounded_stays(divisor):
    report = check_model(rule(), division(divisor))
    (decline,) = report.declines
    assert (decline.reason, decline.culprit) == (f"1/{divisor} is rounded", "c")
    assert not report.applied


def test_a_large_divisor_stays():
    report = check_model(rule(max_elements=1), division("2, 8", shape="[2]"))
    assert report.declines[0].reason == "the divisor holds 2 numbers, more than max_elements (1)"


def test_a_computed_divisor_is_none_of_its_business():
    report = check_model(rule(), division(body="y = Div(x, d)"))
    assert not report.applied and not report.declines
