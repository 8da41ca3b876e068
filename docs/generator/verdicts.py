"""What the measurements of a runtime say of a form: of itself, or of everything that it is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from probe.answers import Answers, Verdict
from probe.forms import Form, LinearForm, LookupForm, MoEForm, QMoEForm

Known = Verdict | Literal["in parts", "unmeasured"]

_ORDER: tuple[Verdict, ...] = ("right", "rounds", "wrong", "refused", "fails", "crashes")


@dataclass(frozen=True)
class Verdicts:
    """What was measured on one version of a runtime, in each of its patches.

    Attributes:
        exact: form -> the worst that was seen.
        parts: part of a form -> the best that was seen of a form that has it.
    """

    exact: dict[Form, Verdict]
    parts: dict[str, Verdict]

    @classmethod
    def of(cls, patches: Sequence[Answers]) -> Verdicts:
        """Reads files of answers."""
        seen: dict[Form, list[Verdict]] = defaultdict(list)
        for own in patches:
            for answer in own.answers:
                seen[answer.form].append(answer.verdict(own.provider))
        exact = {form: max(verdicts, key=_ORDER.index) for form, verdicts in seen.items()}
        parts: dict[str, Verdict] = {}
        for form, verdict in exact.items():
            for part in parts_of(form):
                parts[part] = min(verdict, parts.get(part, verdict), key=_ORDER.index)
        return cls(exact, parts)

    def known(self, form: Form) -> Known:
        """Returns what was seen of the form; ``in parts`` where each of its parts is right in another form."""
        for own in _same(form):
            if own in self.exact:
                return self.exact[own]
        return "unmeasured" if self.unmeasured(form) else "in parts"

    def unmeasured(self, form: Form) -> list[str]:
        """Returns the parts of a form that no form has which was measured right."""
        return [part for part in parts_of(form) if self.parts.get(part) not in ("right", "rounds")]


def _same(form: Form) -> Iterator[Form]:
    yield form
    if isinstance(form, QMoEForm) and form.bits == (3, 3):
        yield replace(form, scales="positive")  # as 3 bits are written


def parts_of(form: Form) -> list[str]:
    """Returns what kernels choose their code by, each with what it may depend on: sizes only by where they end."""
    if isinstance(form, LinearForm):
        head, parts = _linear(form)
    elif isinstance(form, LookupForm):
        head, parts = _lookup(form)
    else:
        head, parts = _experts(form)
    return [f"{form.operator} {head}: {part}" for part in parts]


def _linear(form: LinearForm) -> tuple[str, list[str]]:
    ends = "" if form.k % form.block == 0 else ", K ends within a block"
    parts = [_held(form.bits, form.block, form.zeros), f"{form.bits} bits{ends}"]
    parts += ["a bias"] * form.bias + [f"accuracy_level {form.level}"] * bool(form.level) + ["N odd"] * (form.n % 2)
    return f"{form.x.lower()} {form.layout}", parts


def _lookup(form: LookupForm) -> tuple[str, list[str]]:
    ends = "" if form.k % form.block == 0 else ", K ends within a block"
    if form.zeros != "none" and -(-form.k // form.block) * form.bits % 8:
        ends += ", zero points end within a byte"
    return form.x.lower(), [_held(form.bits, form.block, form.zeros), f"{form.bits} bits, rank {form.rank}{ends}"]


def _experts(form: MoEForm) -> tuple[str, list[str]]:
    head, parts = form.x.lower(), []
    if isinstance(form, QMoEForm):
        own = [form.layout, *[form.quant] * (form.quant != "int"), *["3 bits"] * (form.bits == (3, 3))]
        head = " ".join([head, *own, *["mixed widths"] * (len(set(form.bits)) > 1)])
        bits = "/".join(map(str, dict.fromkeys(form.bits)))
        prepacked = "" if form.prepacked == "auto" else f", weights_prepacked {form.prepacked}"
        parts.append(_held(bits, form.block, form.zeros) + prepacked)
        zeros = "" if form.zeros == "none" else f", zero points of {form.zeros}"
        parts += sorted({f"{bits} bits{zeros}{_ends(form, k)}" for k in (form.h, form.i)})
        parts += ["router_weights"] * form.weights + [f"accuracy_level {form.level}"] * bool(form.level)
    act = f"{form.act} gated by fc3" if form.fc3 else f"{form.act}, fusion {form.fusion}" if form.fusion else form.act
    own_constants = form.constants != MoEForm.constants
    parts += [act, f"a bias {form.bias}" if form.bias != "none" else "no bias"]
    parts += ["SwiGLU constants"] * own_constants + ["sparse mixer"] * form.sparse
    parts += ["unnormalised"] * (not form.normalize) + ["top 1"] * (form.top == 1) + ["rank 3"] * (form.rank == 3)
    return head, parts


def _held(bits: int | str, block: int, zeros: str) -> str:
    return f"{bits} bits, block {block or 'row'}" + ("" if zeros == "none" else f", zero points {zeros}")


def _ends(form: QMoEForm, k: int) -> str:
    blocks = k // form.block if form.block else 1
    filled = form.zeros == "none" or all(blocks * bits % 8 == 0 for bits in form.bits)
    return ("" if k % 64 == 0 else ", K no multiple of 64") + ("" if filled else ", zero points end within a byte")
