"""Combines by themselves: masks of experts, the share of each, the weighted expert, and the sum of all."""

from __future__ import annotations

from stated import CHOICE, PLAIN, STACKED, held

from rewriter.rules.blocks.mixing import Complete, Mixed, Share, Sparse, Weighted

ONE = f"{CHOICE} m = Equal (i, one) c = Cast <to = 1> (m) w = Mul (v, c) s = ReduceSum (w, last)"
"""The share of expert 1, [T, 1]."""
ALL = f"{CHOICE} z = Shape (r) e = ConstantOfShape (z) s = ScatterElements <axis = 1> (e, i, v)"
"""The share of every expert, [T, E]."""


def test_weights_under_a_mask_are_a_share():
    found = held(ONE.replace("w = Mul", "y = Mul").partition(" s = ")[0])
    assert isinstance(found, Share) and (found.expert, found.slots) == (1, None)
    found = held(ONE.replace(" s = ", " y = "))
    assert found.slots == {0, 1} and found.complete
    where = held(f"{CHOICE} m = Equal (i, one) y = Where (m, v, c0)")
    assert isinstance(where, Share) and where.expert == 1
    assert held(f"{CHOICE} m = Equal (i, one) y = Where (m, v, c1)") is None


def test_weights_of_another_slot_are_at_fault():
    slots = f"{CHOICE} a = Gather <axis = 1> (v, zero) j = Gather <axis = 1> (i, one) m = Equal (j, one)"
    found = held(f"{slots} c = Cast <to = 1> (m) y = Mul (a, c)")
    assert "the choice of another slot" in found.mixing.fault


def test_shares_of_two_slots_add_up():
    each = "{0} = Gather <axis = 1> (v, {1}) j{1} = Gather <axis = 1> (i, {1}) m{1} = Equal (j{1}, three)"
    each += " c{1}_ = Cast <to = 1> (m{1}) s{1} = Mul ({0}, c{1}_)"
    body = f"{CHOICE} {each.format('a', 'zero')} {each.format('d', 'one')}"
    found = held(f"{body} y = Add (szero, sone)")
    assert found.complete and found.expert == 3
    assert held(f"{body} y = Add (szero, szero)") is None


def test_scattered_weights_are_every_experts_share():
    found = held(ALL.replace(" s = ", " y = "))
    assert isinstance(found, Share) and found.complete and found.expert is None
    seeded = ALL.replace(" s = ", " y = ")
    assert isinstance(held(seeded.replace("ConstantOfShape (z)", "Expand (infinite, z)")), Sparse)
    assert held(seeded.replace("ConstantOfShape (z)", "Expand (c1, z)")) is None
    assert held(seeded.replace("<axis = 1>", "<axis = 0>")) is None


def test_an_expert_times_its_share():
    found = held(f"{ONE} {PLAIN} y = Mul (o, s)")
    (term,) = found.terms()
    assert isinstance(found, Mixed) and term.expert == 1 and term.output.activation.kind.name == "relu"
    found = held(f"{ONE} n = Tanh (x) y = Mul (n, s)")
    assert [term.output for term in found.terms()] == [None]  # something else, which the rule will name


def test_sums():
    two = ONE + " n = Equal (i, two) d = Cast <to = 1> (n) b_ = Mul (v, d) t = ReduceSum (b_, last)"
    two += f" {PLAIN} p1 = Mul (o, s) p2 = Mul (t, o)"
    found = held(f"{two} y = Add (p1, p2)")
    assert [term.expert for term in found.terms()] == [1, 2] and not found.complete
    found = held(f"{two} q = Add (p1, p2) y = Add (q, x)")
    assert [start.value.name for start in found.starts()] == ["x"]
    assert held(f"{two} q = Add (p1, p2) y = Mul (q, c2)").mixing.scale == 2


def test_all_experts_at_once():
    weighed = f"{ALL} {STACKED} a2 = Transpose (s) u = Unsqueeze (a2, last)"
    found = held(f"{weighed} y = Mul (o, u)")
    assert isinstance(found, Weighted) and found.over == "expert" and found.output.by == "all"
    assert isinstance(held(f"{weighed} q = Mul (o, u) y = ReduceSum <keepdims = 0> (q, first)"), Complete)
    assert held(f"{weighed} q = Mul (o, u) y = ReduceSum <keepdims = 0> (q, last)") is None


def test_two_blocks_with_one_router_are_no_sum_of_one():
    each = "n{0} = Equal (i, {0}) d{0} = Cast <to = 1> (n{0}) b{0} = Mul (v, d{0}) "
    each += "t{0} = ReduceSum (b{0}, last) p{0} = Mul (t{0}, o)"
    body = " ".join([CHOICE, PLAIN, *(each.format(e) for e in ("zero", "one", "two", "three"))])
    half = f"{body} q = Add (pzero, pone) s = Add (q, ptwo)"
    assert held(f"{half} y = Add (s, pthree)").complete
    assert held(f"{half} f = Add (s, pthree) y = Add (f, f)") is None
