"""Matching is pure: a rule that edits what it looks at is named, and inputs and outputs are as they were declared."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import pattern

import rewriter
from rewriter import emit
from rewriter.engine import purity
from rewriter.errors import RuleError
from rewriter.rule import Declined, Rule
from rewriter.testing import check_model

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y) { a = Relu(x) b = Neg(a) y = Relu(b) }"""


def model(text=TEXT):
    return ir.from_onnx_text(text)


class Edits(Rule):
    """Does something to the model, and declines."""

    def __init__(self, edit):
        super().__init__(name="edits")
        self._edit = edit

    def pattern(self, op, x):
        return op.Neg(x, _outputs=["y"])

    def rewrite(self, op, *, x, y):
        self._edit(op, x, y)
        raise Declined("only looked", y)


EDITS = {
    "shape of value 'a'": lambda op, x, y: setattr(x, "shape", ir.Shape([None, 3])),
    "type of value 'a'": lambda op, x, y: setattr(x, "dtype", ir.DataType.FLOAT16),
    "shape of value 'x'": lambda op, x, y: setattr(x.producer().inputs[0], "shape", ir.Shape([2, None])),
    "name of value 'c'": lambda op, x, y: setattr(y, "name", "c"),
    "metadata of node": lambda op, x, y: y.producer().metadata_props.update(seen="yes"),
    "attributes of node": lambda op, x, y: y.producer().attributes.add(ir.AttrInt64("axis", 1)),
    "inputs of node": lambda op, x, y: y.producer().replace_input_with(0, x.producer().inputs[0]),
    "metadata of graph": lambda op, x, y: y.producer().graph.metadata_props.update(seen="yes"),
    "operator of node": lambda op, x, y: setattr(y.producer(), "op_type", "Abs"),
    "it has": lambda op, x, y: y.producer().graph.append(ir.node("Abs", [x])),
    "initializers of graph": lambda op, x, y: y.producer().graph.register_initializer(
        ir.Value(name="w", const_value=ir.tensor(np.zeros(2, np.float32), name="w"))
    ),
    "opset imports of graph": lambda op, x, y: y.producer().graph.opset_imports.update({"com.microsoft": 1}),
}


@pytest.mark.parametrize("said", EDITS)
def test_a_rule_that_edits_what_it_looks_at_is_named_with_what_it_changed(said):
    with purity.checked(), pytest.raises(RuleError, match=f"^rule edits at node .*while it was matched: {said}"):
        rewriter.apply(model(), [Edits(EDITS[said])])


def test_the_harness_checks_for_it():
    with pytest.raises(AssertionError, match="while it was matched: shape of value 'a'"):
        check_model([Edits(EDITS["shape of value 'a'"])], model())


def test_a_rule_that_only_looks_is_not_complained_of():
    with purity.checked():
        report = rewriter.apply(model(), [Edits(lambda op, x, y: op.Abs(x))]).report
    assert [d.reason for d in report.declines] == ["only looked"]


def test_an_input_that_a_rule_edits_is_seen_without_the_check():
    token = purity._CHECKED.set(False)
    try:
        with pytest.raises(RuleError, match=r"the model's inputs changed: 'x' FLOAT\[2,3\] -> 'x' FLOAT\[2,None\]"):
            rewriter.apply(model(), [Edits(EDITS["shape of value 'x'"])])
    finally:
        purity._CHECKED.reset(token)


@pytest.mark.parametrize("shape", [[2], [2, 4], [2, 3, 1]])
def test_a_replacement_of_another_shape_is_refused(shape):
    def replaced(op, x):
        return emit.typed(op.Abs(x), ir.DataType.FLOAT, shape)

    rule = pattern.RewriteRule(lambda op, x: op.Relu(x), replaced, name="shapes")
    text = TEXT.replace("{ a =", "<float[2,3] a> { a =")
    with pytest.raises(RuleError, match="is \\[2,3\\], its replacement"):
        rewriter.apply(model(text), [rule], overrides={"parity.local": "none"})


def test_an_output_keeps_its_declaration_whole():
    given = model(TEXT.replace("=> (float[2,3] y)", '=> (float["n",3] y)'))
    given.graph.outputs[0].doc_string = "logits"
    given.graph.outputs[0].metadata_props["unit"] = "nats"

    def replaced(op, x):
        return emit.typed(op.Max(op.Neg(x), op.Sub(x, x)), ir.DataType.FLOAT, [2, 3])

    rule = pattern.RewriteRule(lambda op, x: op.Relu(op.Neg(x)), replaced, name="bounds")
    (out,) = rewriter.apply(given, [rule]).ir_model.graph.outputs
    assert (out.name, str(out.shape), out.doc_string, out.metadata_props) == ("y", "[n,3]", "logits", {"unit": "nats"})


def test_only_a_value_that_the_replacement_made_is_typed():
    def replaced(op, x):
        return op.Abs(emit.typed(x, ir.DataType.FLOAT, [2, 3]))

    rule = pattern.RewriteRule(lambda op, x: op.Relu(x), replaced, name="types")
    with pytest.raises(RuleError, match="'x' is the model's own value"):
        rewriter.apply(model(), [rule])
