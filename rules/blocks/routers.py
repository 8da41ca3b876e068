"""Routers: logits -> scores -> the k chosen experts and the weights with which they are mixed.

Facts stated: ``Scores``, ``Composed``, ``Located`` with content ``Chosen`` or ``Mixing``. Softmax before or after TopK,
sigmoid, weights taken from other scores than those that selected, with casts around: each is a function of a few lines,
and what they amount to is asked once, by the rule. What becomes of the chosen's weights is in ``routing_weights``.
Source: transformers' routers as torch.onnx and mobius write them.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import Dims, Size
from rewriter.graph.attributes import cast_type, integer_attribute
from rewriter.graph.declines import FIXED_COUNT, OTHER_FUNCTION
from rewriter.rule import Declined
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Atom, Axes, Located, only
from rewriter.rules.blocks.contents import Composed, Features, Output, Router, Scores
from rewriter.rules.blocks.mixing import Chosen, Complete, Mask, Mixed, Mixing, Share, Sparse, Total, Weighted
from rewriter.rules.blocks.routing_weights import opaque
from rewriter.rules.blocks.token_axes import token_axes
from rewriter.rules.blocks.uniform import uniform_of

routers = Family("routers")

_ROUNDING = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_UNNAMED = ("Tanh", "Log", "Abs", "Elu", "Relu", "Softsign", "HardSigmoid", "Erf", "Mish", "Gelu", "Softplus", "Exp")
"""Operators that begin a chain of functions which a reason names."""
_PASSING = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Cast", "Identity")
"""Operators that go on with such a chain; they begin none."""
_NAMED = 100
"""Characters of a chain of functions that a reason names."""


def last_axis(node: ir.Node, rank: int, default: int = -1) -> bool:
    """Whether the node's ``axis`` is the last of ``rank``."""
    return integer_attribute(node, "axis", default) % rank == rank - 1


@routers.at("Softmax", "LogSoftmax")
def softmax(facts: Facts, node: ir.Node, x: ir.Value) -> Scores | Located | None:
    """Over all experts, or over the chosen ones."""
    located = facts.get(x, Located) if node.op_type == "Softmax" else None
    if located is not None and isinstance(located.content, Mixing):
        held = located.content
        axis = integer_attribute(node, "axis", -1 if facts.opset >= 13 else 1) % located.rank
        if not only(located.axes[axis], "slot") or held.slot is not None:
            raise Declined("Softmax is not over the chosen experts", node)
        if not held.scores.shifted or (held.stage, held.scale, held.table) != ("raw", 1.0, None):
            raise Declined("Softmax over chosen weights that are no logits", node)
        return dataclasses.replace(located, content=dataclasses.replace(held, stage="softmax", value=node.outputs[0]))
    if located is not None and isinstance(located.content, Sparse):
        held = located.content.mixing
        if not last_axis(node, located.rank, -1 if facts.opset >= 13 else 1) or not only(located.axes[-1], "expert"):
            raise Declined("Softmax is not over the experts", node)
        if not held.scores.shifted or (held.stage, held.scale, held.table) != ("raw", 1.0, None):
            raise Declined("Softmax over chosen weights that are no logits", node)
        mixed = dataclasses.replace(held, stage="softmax", value=None)
        return Located(Share(mixed, None, frozenset(range(held.router.k))), located.axes)
    scores = scores_of(facts, x)
    axis = integer_attribute(node, "axis", -1 if facts.opset >= 13 else 1)
    dims = shape_of(facts, x) if axis != -1 else None
    if scores.function != "logits" or (axis != -1 and (not dims or axis % len(dims) != len(dims) - 1)):
        return None
    return Scores(scores.logits, "softmax" if node.op_type == "Softmax" else "log_softmax")


@routers.at("Sigmoid")
def sigmoid(facts: Facts, node: ir.Node, x: ir.Value) -> Scores | Located | None:
    """Of every logit, or of the chosen ones: the order of both is the same."""
    located = facts.get(x, Located)
    if located is not None and isinstance(located.content, Mixing):
        held = located.content
        if (held.stage, held.scale, held.table, held.scores.function, held.slot) != ("raw", 1.0, None, "logits", None):
            return None
        late = Scores(held.scores.logits, "sigmoid")
        return dataclasses.replace(
            located, content=dataclasses.replace(held, scores=late, late=True, value=node.outputs[0])
        )
    scores = scores_of(facts, x)
    return Scores(scores.logits, "sigmoid") if scores.function == "logits" else None


@routers.at("Softmax")
def mixture(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """The weights of every expert, where what is mixed is all of them."""
    located, dims = facts.get(x, Located), shape_of(facts, x)
    count = dims[-1].constant if dims else None
    chosen = located is not None and isinstance(located.content, Mixing | Sparse | Share)
    producer = x.producer()
    masked = producer is not None and producer.op_type in ("ScatterElements", "ScatterND", "Where")
    chosen = chosen or masked  # where a logit is minus infinity, kernels do not choose as many as there are
    if dims is None or count is None or chosen or not last_axis(node, len(dims), -1 if facts.opset >= 13 else 1):
        return None
    scores = Scores(x, "softmax")
    mixing = Mixing(Router(node, scores, count, count), scores, node.outputs[0], "softmax", value=node.outputs[0])
    lead = token_axes(facts, x) or ()
    return Located(Share(mixing, None, frozenset(range(count))), (*lead, (Atom("expert", Size(count)),)))


@routers.at("Cast")
def cast_mixture(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """A cast of every expert's weights, which are scores too."""
    located, to = facts.get(x, Located), cast_type(node)
    whole = located is not None and isinstance(located.content, Share) and facts.get(x, Scores) is not None
    return located if whole and to is not None and to.is_floating_point() else None


@routers.at("Sigmoid")
def sigmoid_of_sparse(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """Sigmoids of the chosen logits where their experts are, and of minus infinity, 0, elsewhere."""
    located = facts.get(x, Located)
    if located is None or not isinstance(located.content, Sparse):
        return None
    held = located.content.mixing
    if (held.stage, held.scale, held.table, held.scores.function) != ("raw", 1.0, None, "logits"):
        return None
    late = dataclasses.replace(held, scores=Scores(held.scores.logits, "sigmoid"), late=True, value=None)
    return dataclasses.replace(located, content=Share(late, None, frozenset(range(held.router.k))))


@routers.at(*_UNNAMED, *_PASSING)
def composed(facts: Facts, node: ir.Node, x: ir.Value, *others: ir.Value | None) -> Composed | None:
    """What a value is a function of, where that has no name of its own: the report says it if nothing can be done."""
    if node.op_type in _PASSING and not any(facts.get(v, Composed) for v in (x, *others)):
        return None
    if node.op_type in ("Cast", "Identity"):
        return facts.get(x, Composed)
    return Composed(f"{node.op_type.lower()}({', '.join(_text(facts, v) for v in (x, *others))})")


def _text(facts: Facts, value: ir.Value | None) -> str:
    held, number = facts.get(value, Composed), number_of(facts, value)
    if held is None:
        return "x" if number is None else f"{number:g}"
    return held.text if len(held.text) <= _NAMED else "..."  # a chain of many would be named in gigabytes


@routers.at("Softplus", "Exp")
def positive(facts: Facts, node: ir.Node, x: ir.Value) -> Scores:
    """Scores that are never negative: a softplus, or a softmax whose sum is another operator's."""
    return Scores(node.outputs[0], "positive")


@routers.at("Exp")
def late_softmax(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """The exponentials of chosen logarithms of a softmax over all experts: what the softmax gives them."""
    located = facts.get(x, Located)
    if located is None or not isinstance(located.content, Mixing):
        return None
    held = located.content
    if (held.stage, held.scale, held.table, held.scores.function) != ("raw", 1.0, None, "log_softmax"):
        return None
    known = dataclasses.replace(held, scores=Scores(held.scores.logits, "softmax"), value=node.outputs[0])
    return dataclasses.replace(located, content=known)


@routers.at("Sqrt")
def sqrt(facts: Facts, node: ir.Node, x: ir.Value) -> Scores | None:
    """The root of scores that are never negative."""
    scores = facts.get(x, Scores)
    return None if scores is None or not scores.positive else Scores(node.outputs[0], "positive")


@routers.at("Where")
def threshold(facts: Facts, node: ir.Node, mask: ir.Value, yes: ir.Value, no: ir.Value) -> Scores | None:
    """``Where(x > number, x, scores)``: a softplus that is x where it is large."""
    greater, scores = mask.producer(), facts.get(no, Scores)
    if greater is None or greater.op_type != "Greater" or greater.inputs[0] is not yes or scores is None:
        return None
    number = number_of(facts, greater.inputs[1])
    positive = scores.positive and number is not None and number >= 0
    return Scores(node.outputs[0], "positive") if positive else None


@routers.at("Cast")
def cast(facts: Facts, node: ir.Node, x: ir.Value) -> Scores | Located | None:
    """Casts that do not round scores; of weights, where they are rounded is remembered."""
    to = cast_type(node)
    located = facts.get(x, Located)
    if to is None:
        return None
    if located is not None and isinstance(located.content, Mixing | Share | Total) and not facts.get(x, Scores):
        held = located.content
        if not to.is_floating_point():
            return None
        if to not in _ROUNDING or isinstance(held, Total):
            return located
        return dataclasses.replace(located, content=rounded(held, to, node.outputs[0]))
    if located is not None and isinstance(located.content, Chosen):
        return located if to in (ir.DataType.INT64, ir.DataType.INT32) else None
    if located is not None and isinstance(located.content, Mask):
        return located
    if located is not None and isinstance(located.content, Output):
        return located if to in (x.dtype, ir.DataType.FLOAT) and x.dtype in (*_ROUNDING, to) else None
    if located is not None and isinstance(located.content, Weighted | Complete):
        return located if _sums_wider(located.content, x.dtype, to) else None
    known = facts.get(x, Scores)
    wider = to == ir.DataType.FLOAT and x.dtype in _ROUNDING
    if known is None and located is not None and not (wider and isinstance(located.content, Features)):
        return located if to == (x.dtype or _sum_dtype(located)) else None
    exact = to == x.dtype or (to == ir.DataType.FLOAT and x.dtype in (None, ir.DataType.FLOAT, *_ROUNDING))
    return scores_of(facts, x) if exact else None


def _sum_dtype(located: Located) -> ir.DataType | None:
    """The element type of a sum of experts, as their weights tell it."""
    held = located.content
    output = next((term.output for term in held.terms()), None) if isinstance(held, Mixed) else None
    return None if output is None else output.down.dtype


def _sums_wider(held: Weighted | Complete, dtype: ir.DataType | None, to: ir.DataType) -> bool:
    """Whether a cast only makes a sum of half-precision numbers be computed in float32."""
    if isinstance(held, Weighted):
        return dtype in _ROUNDING and to == ir.DataType.FLOAT
    return dtype == ir.DataType.FLOAT and to in _ROUNDING


def rounded(held: Mixing | Share, to: ir.DataType, out: ir.Value) -> Mixing | Share:
    """Returns the weights, cast to a type that rounds them."""
    if isinstance(held, Share):
        return dataclasses.replace(held, mixing=dataclasses.replace(held.mixing, rounded=to))
    return dataclasses.replace(held, rounded=to, value=out)


def scores_of(facts: Facts, value: ir.Value) -> Scores:
    """Returns what is known of a value as scores; a value of which nothing is known is logits in its own right."""
    return facts.get(value, Scores) or Scores(value, "logits")


@routers.at("TopK")
def top_k(facts: Facts, node: ir.Node, scores: ir.Value, k: ir.Value) -> dict[ir.Value, object] | None:
    """The k largest scores along the last axis: their values and their indices."""
    values, indices = node.outputs
    dims = shape_of(facts, scores)
    if not dims or not _is_float(scores):
        return None
    if reason := chosen_by_experts(node, dims):
        raise Declined(reason, node, remedy=OTHER_FUNCTION)
    experts = dims[-1].constant
    if experts is None or not last_axis(node, len(dims)):
        return None
    count = static(facts, node, 1)
    if count is None:
        why = facts.why_not(k)
        how = f"'{k.name}' is not constant{f': {why}' if why else ''}"
        raise Declined(f"how many experts a token gets is not fixed: {how}", node, remedy=why.remedy or FIXED_COUNT)
    if len(count) != 1 or not 1 <= count[0] <= experts:
        return None
    fault = "" if integer_attribute(node, "largest", 1) == 1 else "TopK takes the smallest scores"
    router = Router(node, scores_of(facts, scores), count[0], experts, fault)
    axes = (*(token_axes(facts, scores) or ()), (Atom("slot", Size(count[0])),))
    return {
        values: Located(Mixing(router, router.scores, scores, value=values), axes),
        indices: Located(Chosen(router), axes),
    }


def chosen_by_experts(node: ir.Node, dims: Dims) -> str:
    """Returns what it means that a TopK is along the tokens, whose number is not known; empty where it is not."""
    axis = integer_attribute(node, "axis", -1) % len(dims)
    others = [size.constant for i, size in enumerate(dims) if i != axis]
    each = dims[axis].constant is None and any(count is not None and count > 1 for count in others)
    return "the experts choose their tokens, and not each token its experts" if each else ""


@routers.at("ArgMax")
def arg_max(facts: Facts, node: ir.Node, scores: ir.Value) -> Located | None:
    """The largest score along the last axis: a choice of one expert."""
    router = _router_of_maximum(facts, node, scores)
    if router is None:
        return None
    return Located(Chosen(router, 0), _maximum_axes(facts, node, scores))


@routers.at("ReduceMax")
def maximum(facts: Facts, node: ir.Node, scores: ir.Value, *others: ir.Value | None) -> Located | None:
    """The weight of the one expert that an ArgMax of the same scores chooses."""
    dims = shape_of(facts, scores)
    chosen = next((use.node for use in scores.uses() if use.node.op_type == "ArgMax"), None)
    router = None if chosen is None else _router_of_maximum(facts, chosen, scores)
    if router is None or dims is None or static(facts, node, 1, "axes") not in ([-1], [len(dims) - 1]):
        return None
    held = Mixing(router, router.scores, scores, slot=0, value=node.outputs[0])
    return Located(held, _maximum_axes(facts, node, scores))


def _maximum_axes(facts: Facts, node: ir.Node, scores: ir.Value) -> Axes:
    """The dimensions of a maximum over the last one."""
    return (*(token_axes(facts, scores) or ()), *([()] if integer_attribute(node, "keepdims", 1) else []))


def _router_of_maximum(facts: Facts, node: ir.Node, scores: ir.Value) -> Router | None:
    """The router that an ArgMax along the last axis is."""
    dims = shape_of(facts, scores)
    if not dims or dims[-1].constant is None or not _is_float(scores) or not last_axis(node, len(dims), 0):
        return None
    fault = "ArgMax takes the last of equal scores" if integer_attribute(node, "select_last_index", 0) else ""
    return Router(node, scores_of(facts, scores), 1, dims[-1].constant, fault)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


@routers.at("Where")
def masked(facts: Facts, node: ir.Node, mask: ir.Value, yes: ir.Value, no: ir.Value) -> Scores | None:
    """Scores of which some are set to a number, as those of groups that were not selected."""
    for value, other in ((yes, no), (no, yes)):
        scores, number = facts.get(value, Scores), uniform_of(facts, other)
        if scores is not None and scores.positive and number is not None and number >= 0:
            return Scores(node.outputs[0], "positive")
    return None


@routers.at("GatherElements")
def gather_elements(facts: Facts, node: ir.Node, scores: ir.Value, chosen: ir.Value) -> Located | None:
    """The chosen experts' weights, taken from other scores than those that selected."""
    located = facts.get(chosen, Located)
    if located is None or not isinstance(located.content, Chosen):
        return None
    dims = shape_of(facts, scores)
    held = located.content
    if not dims or not last_axis(node, len(dims), 0) or len(dims) != located.rank:
        return None
    slotted = only(located.axes[-1], "slot") if held.slot is None else held.router.k == 1 and not located.axes[-1]
    if token_axes(facts, scores) != located.axes[:-1] or not slotted:
        return None
    if dims[-1].constant != held.router.experts:
        return None
    mixing = Mixing(held.router, scores_of(facts, scores), scores, slot=held.slot, value=node.outputs[0])
    return Located(mixing, located.axes)


@routers.at("Where")
def instead(facts: Facts, node: ir.Node, mask: ir.Value, yes: ir.Value, no: ir.Value) -> Located | None:
    """Another expert in the place of one, or no weight for it: what skips a token."""
    where, located, number = facts.get(mask, Located), facts.get(no, Located), uniform_of(facts, yes)
    if where is None or located is None or number is None or where.axes != located.axes:
        return None
    at, held, out = where.content, located.content, node.outputs[0]
    if not isinstance(at, Mask) or at.expert is None or not isinstance(held, Chosen | Mixing):
        return None
    if at.router != held.router or at.slot != held.slot or held.slot is not None:
        return None
    if isinstance(held, Mixing):
        return None if number else Located(opaque(held, f"expert {at.expert} has no weight", node), located.axes)
    router, last = held.router, held.router.experts - 1
    if not 0 <= number < last or at.expert != last:
        return None
    changed = dataclasses.replace(router, experts=last, made=(router,), choice=out)
    return Located(Chosen(changed), located.axes)


@routers.at("Concat")
def side_by_side(facts: Facts, node: ir.Node, first: ir.Value, *others: ir.Value | None) -> Located | None:
    """Choices of one expert each, as one of several; their weights likewise."""
    parts = [located for v in (first, *others) if (located := facts.get(v, Located)) is not None]
    slotted = [part for part in parts if isinstance(part.content, Mixing) and part.rank and only(part.axes[-1], "slot")]
    if slotted and others and len(slotted) <= len(others) and last_axis(node, slotted[0].rank, 0):
        raise Declined("the weights of the chosen depend on other numbers too, which are put beside their scores", node)
    if len(parts) != 1 + len(others) or any(part.axes != parts[0].axes for part in parts) or not parts[0].rank:
        return None
    if parts[0].axes[-1] or not last_axis(node, parts[0].rank, 0):
        return None
    held = [part.content for part in parts if isinstance(part.content, Chosen | Mixing) and part.content.slot == 0]
    if len(held) != len(parts) or {type(each) for each in held} not in ({Chosen}, {Mixing}):
        return None
    routers_ = tuple(each.router for each in held)
    if len({router.experts for router in routers_}) != 1 or any(router.k != 1 for router in routers_):
        return None
    joint = dataclasses.replace(routers_[0], k=len(held), made=routers_)
    axes = (*parts[0].axes[:-1], (Atom("slot", Size(len(held))),))
    weights = [each for each in held if isinstance(each, Mixing)]
    if not weights:
        return Located(Chosen(dataclasses.replace(joint, choice=node.outputs[0])), axes)
    least = next((each for each in weights if not each.positive), weights[0])
    mixing = dataclasses.replace(least, router=joint, slot=None)
    return Located(opaque(mixing, "it chooses one expert after the other", node), axes)
