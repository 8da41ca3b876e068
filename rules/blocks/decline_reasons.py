"""Why the experts that a router chooses are no block that is known: what the report says of those that stay apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import Integers
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.contents import subgraphs
from rewriter.graph.declines import NO_LOOP, Reason
from rewriter.graph.walk import GaveUp, producers, readers, walk
from rewriter.operators.form import is_experts
from rewriter.rule import Declined, NotApplicable, Run
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.block import why_not_whole
from rewriter.rules.blocks.contents import Features, Output
from rewriter.rules.blocks.mixing import Chosen
from rewriter.rules.blocks.sums import completes, end_of_sum, on_hits, router_of
from rewriter.rules.blocks.unknown import is_number, named, why_unknown
from rewriter.tensors import View


def chooses_experts(run: Run, node: ir.Node) -> bool:
    """Whether a node is what a router chooses by, or nearly is, or takes a token's experts from a table.

    Any ArgMax may be; a TopK that is none says why.
    """
    return node.op_type == "ArgMax" or _is_choice(run.facts, node) or bool(_why_no_choice(run.facts, node))


def decline_unfused(run: Run, choice: ir.Node, ends: Sequence[str]) -> None:
    """Declines, naming the first operator behind a choice of experts that is not understood.

    Args:
        run: the run.
        choice: a TopK or an ArgMax of scores, or what takes a token's experts from a table; see ``chooses_experts``.
        ends: the operators that complete a block.

    Raises:
        Declined: experts follow the choice, and nothing completes a block.
        NotApplicable: no experts follow, the operator that completes the block speaks for it, or the scores are no
            router's own, as those of a second choice.
    """
    if not chooses_experts(run, choice) or (choice.op_type == "ArgMax" and not _is_first_choice(run, choice)):
        raise NotApplicable
    unknown: ir.Node | None = None
    told: ir.Node | None = None
    hit: ir.Node | None = None
    unfinished: Declined | None = None
    experts = False
    try:
        for node in _following(*choice.outputs):
            if is_experts(node) and not experts:
                raise NotApplicable
            if is_experts(node):  # of what is computed from these
                continue
            unfinished = unfinished or _unfinished(run.facts, node, choice, ends)
            if node.op_type == "TopK" and _is_choice(run.facts, node):
                break  # what follows is of that router
            reads_expert = run.role(node).name.startswith("expert.")
            if reads_expert and hit is not None and node.op_type in ("Gather", "GatherND"):
                reason = "the trace fixed how many experts a token can reach: NonZero lists those that were hit"
                raise Declined(reason, hit, remedy=NO_LOOP)
            experts = experts or reads_expert or _meets_expert(run, node)
            hit = node if hit is None and node.op_type == "NonZero" else hit
            if not any(_is_known(run.facts, out) for out in node.outputs):
                unknown = unknown or node
                told = told or (node if _tells_why(run.facts, node) else None)
    except GaveUp:
        if not experts and unfinished is None:
            raise
    if unfinished is not None:
        raise unfinished
    if experts and (why := _why_no_choice(run.facts, choice)):
        raise Declined(named(why), choice)
    if not experts or unknown is None:
        raise NotApplicable
    raise _of_unknown(run.facts, told or unknown)


def _of_unknown(facts: Facts, node: ir.Node) -> Declined:
    """Why a choice is not followed behind ``node``: what else it reads is not understood, or it is not itself."""
    choice = next((v.producer() for v in node.inputs if v is not None and _is_known(facts, v)), None)
    if node.op_type == "If" and (why := facts.own_reason(node.outputs[0])):
        return Declined(named(why), node)
    if choice is not None and choice.graph is not node.graph:
        around = _around(choice.graph, node)
        reason = "the trace fixed which experts there are: an If asks for each that was hit how many tokens it has"
        if around is not None and around.op_type != "If":
            reason = f"a {around.op_type} takes one expert at each turn, and no operator is told in turns"
        return Declined(named(reason), node, remedy=NO_LOOP)
    given = next((v for v in node.inputs if v is not None and v.is_initializer() and v.is_graph_input()), None)
    if given is not None:
        why = facts.why_not(given)
        return Declined(named(f"'{given.name}' is not constant: {why}"), node, remedy=getattr(why, "remedy", ""))
    if _is_row_of_table(facts, node):
        return Declined(named("each is a row of a table that is gathered when it runs, and no matrix"), node)
    weights = [_is_known(facts, value) for value in node.inputs if value is not None]
    for value in (*node.outputs, *node.inputs) if any(weights) else ():
        if value is None or is_number(facts, value):
            continue
        reason, culprit = why_unknown(facts, value, node)
        if culprit is not node or facts.own_reason(value):
            return Declined(named(reason), culprit)
    return Declined(named(f"how {node.op_type} uses its choice is not understood"), node)


def _tells_why(facts: Facts, node: ir.Node) -> bool:
    """Whether what a node makes is unknown for a reason of its own."""
    return _is_row_of_table(facts, node) or any(facts.own_reason(out) for out in node.outputs)


def _is_row_of_table(facts: Facts, node: ir.Node) -> bool:
    table = facts.get(node.inputs[0], View) if node.op_type == "Gather" else None
    return (
        table is not None
        and table.rank == 2
        and table.dtype.is_floating_point()
        and not _is_known(facts, node.outputs[0])
    )


def _following(*values: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read the values, or what is made of them, the nearest first; a node also for its bodies."""

    def read(at: ir.Value) -> list[ir.Node]:
        producer, found = at.producer(), []
        for node in readers(at):
            inner = producer is not None and node.graph is not producer.graph
            around = _around(producer.graph, node) if inner and producer is not None else None
            found.extend([node] if around is None else [node, around])
        return found

    for value in walk(values, lambda at: [out for node in read(at) for out in node.outputs]):
        yield from read(value)


def _around(graph: ir.Graph | ir.Function | None, node: ir.Node) -> ir.Node | None:
    """The node of a graph that holds another node in one of its bodies."""
    return next((n for n in graph or () if node.graph in subgraphs(n)), None)


def _unfinished(facts: Facts, node: ir.Node, choice: ir.Node, ends: Sequence[str]) -> Declined | None:
    """Why a sum of experts under a choice that begins at ``node`` is never whole: lost, or ended too early.

    Raises:
        NotApplicable: the operator that ends it speaks for it.
    """
    for out in node.outputs:
        located = facts.get(out, Located)
        held = None if located is None or on_hits(located) else located.content
        router = None if held is None else router_of(held)
        if router is None or router.node is not choice:
            continue
        end, lost = end_of_sum(facts, out)
        if completes(facts, end, ends):
            raise NotApplicable
        if lost is None:
            return why_not_whole(facts, end)
        if lost.op_type == "Add":
            return Declined("what a sum of experts is added to is not as large as it", lost)
        reason = f"the experts of this router stay apart: what {lost.op_type} does with their sum is not understood"
        return Declined(facts.why_not(lost.outputs[0]) or reason, lost)
    return None


def reads_stack(run: Run, node: ir.Node) -> bool:
    """Whether a node is a product of something with a stack of matrices."""
    return len(node.inputs) == 2 and node.inputs[0] is not None and _is_stack(run.facts, node.inputs[1])


def decline_dispatch(run: Run, product: ir.Node, ends: Sequence[str]) -> None:
    """Declines where a stack of experts reads what is no token, but mixtures of them.

    Raises:
        Declined: a Softmax over the tokens is before it.
        NotApplicable: none is, or a stack of experts already was.
    """
    facts = run.facts
    if not reads_stack(run, product):
        raise NotApplicable

    def before(at: ir.Value) -> list[ir.Value]:
        given = producers(at)
        return [] if any(_is_stack(facts, v) for v in given) else given

    with contextlib.suppress(GaveUp):
        for at in walk([v for v in product.inputs[:1] if v is not None], before, limit=_NEAR):
            node = at.producer()
            if node is not None and _mixes_tokens(facts, node):
                soft = "every expert reads mixtures of all tokens, as in Soft MoE: a Softmax is over the tokens"
                raise Declined(soft, node)
    raise NotApplicable


def _mixes_tokens(facts: Facts, node: ir.Node) -> bool:
    """Whether a node is a Softmax along the tokens, whose number is not known."""
    if node.op_type != "Softmax" or node.inputs[0] is None or _is_known(facts, node.outputs[-1]):
        return False
    dims = shape_of(facts, node.inputs[0])
    if not dims:
        return False
    axis = integer_attribute(node, "axis", -1) % len(dims)
    return dims[axis].constant is None and axis < len(dims) - 1


def _is_stack(facts: Facts, value: ir.Value | None) -> bool:
    view = facts.get(value, View)
    return view is not None and view.rank == 3 and view.shape[0] > 1 and view.dtype.is_floating_point()


_NEAR = 64


def _is_first_choice(run: Run, node: ir.Node) -> bool:
    """Whether a node chooses by scores that are computed from a router's logits, and from no other choice."""
    found = False

    def before(at: ir.Value) -> list[ir.Value]:
        producer = at.producer()
        return [] if producer is None or run.role(producer).name == "router" else producers(at)

    for at in walk([v for v in node.inputs if v is not None], before):
        producer = at.producer()
        found = found or (producer is not None and run.role(producer).name == "router")
        if producer is not None and producer.op_type in ("ArgMax", "TopK"):
            return False
    return found


def _meets_expert(run: Run, node: ir.Node) -> bool:
    """Whether ``node`` has what experts make on its other side, or an expert's last linear, or its bias."""
    if any(_is_output(run.facts, value) for value in node.inputs):
        return True
    last = {p for v in node.inputs if v is not None and (p := v.producer()) is not None}
    before = {p for n in last if n.op_type == "Add" for v in n.inputs if v is not None and (p := v.producer())}
    return any(run.role(n).name.startswith("expert.") or _is_linear(run.facts, n) for n in (*last, *before))


def _is_linear(facts: Facts, node: ir.Node) -> bool:
    """Whether a node is the last linear of an expert whose activation no operator has."""
    return node.op_type in ("MatMul", "Gemm") and bool(facts.own_reason(node.outputs[0]))


def _is_choice(facts: Facts, node: ir.Node) -> bool:
    """Whether a node is what a router chooses by."""
    located = facts.get(node.outputs[-1], Located)
    return located is not None and isinstance(located.content, Chosen) and located.content.router.node is node


def _why_no_choice(facts: Facts, node: ir.Node) -> Reason:
    """Why a TopK is not what a router chooses by, where it nearly is; empty elsewhere."""
    known = node.op_type != "TopK" or any(_is_known(facts, out) for out in node.outputs)
    return Reason("") if known else facts.own_reason(node.outputs[0])


def _is_output(facts: Facts, value: ir.Value | None) -> bool:
    located = facts.get(value, Located)
    held = None if located is None else located.content
    return isinstance(held, Output) or (isinstance(held, Features) and held.factors[0].linear.by != "one")


def _is_known(facts: Facts, value: ir.Value) -> bool:
    return facts.get(value, Located) is not None or facts.get(value, Integers) is not None
