"""What rules write for a target over a sweep of models and plans, as the forms that the prober measures.

``python tests/target/emission.py cpu@1.31`` prints those of which ``benchmarks/prober/measured`` tells nothing yet, one
a line, for the prober's ``--forms``.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "rules"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "prober"))
sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import onnx_ir as ir
from block_models import GIVEN, ROUTERS, Spelling, block_model
from generator.measured import measured, target_of
from node_forms import of_node
from probe.answers import Answers
from probe.forms import Form, MoEForm, QMoEForm, text_of
from sweep_models import TYPES, Experts, constants_model, experts_model, made_once

import rewriter
from rewriter.target import ADDED, Target

Rules = tuple[object, ...]
Plan = Mapping[str, object]

BLOCKS = (0, 16, 32, 64, 128, 256)
NODES = 8
"""Of MoE, in the model of a plan."""
STANDARD = {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0}
INTERLEAVED = STANDARD | {"swiglu_fusion": 1}
FUNCTIONS = (
    *({"activation_type": name} for name in ("relu", "gelu", "silu", "identity")),
    *(INTERLEAVED, INTERLEAVED, INTERLEAVED),
    INTERLEAVED | {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0},
    STANDARD | {"swiglu_fusion": 2},
    STANDARD | {"fc3": True},
    {"activation_type": "silu", "fc3": True},
    {"activation_type": "geglu", "swiglu_fusion": 1},
    {"activation_type": "relu", "use_sparse_mixer": 1},
)
MOE_RULES: Rules = ("swiglu-interleave", "moe-fuse-fc3")
SIZES = ((512, 128), (512, 128), (256, 96), (480, 128), (320, 128), (40, 128), (512, 97))
"""K and N of linear maps."""
WIDTHS = (256, 256, 96, 120)
"""K of tables."""
CONSTANT_RULES = {
    "GatherBlockQuantized": "gather-to-gather-block-quantized, tie-quantized-embedding",
    "MatMulNBits": "matmul-, gemm-to-matmul-nbits, tie-quantized-embedding",
}
NO_ROUTER = ({"role": "router"},)


@dataclass(frozen=True)
class Written:
    """A node that was written.

    Attributes:
        rule: which wrote it.
        form: of the node.
        named: of an MoE, whether the report says that the target does not compute it.
    """

    rule: str
    form: Form
    named: bool = False


@dataclass(frozen=True)
class Sweep:
    """The models and plans that the rules are given for one target; a model has all that is written with one option.

    Attributes:
        target: the target.
        sizes: H and I of experts, which were measured.
    """

    target: Target
    sizes: tuple[tuple[int, int], ...]

    def experts(self) -> Iterator[Written]:
        """Yields each MoE and QMoE that is written."""
        plans = list(_expert_plans())
        choices = ((4, None), (0, None), (0, "raw"), (0, "cutlass-sm80"), (0, "columns"), (0, "auto"))
        for number, (level, layout) in enumerate(choices):
            yield from self._quantized(plans[number :: len(choices)], level, layout)
        yield from self._remade()

    def _quantized(self, plans: list[tuple[Plan, ...]], level: int, layout: str | None) -> Iterator[Written]:
        drawn = (self._drawn(str(plan)) for plan in plans)
        nodes = {f"p{n}_{i}": one for n, own in enumerate(drawn) for i, one in enumerate(own)}
        overrides = [{"nodes": f"p{n}_*", **own} for n, plan in enumerate(plans) for own in plan]
        rules = (MOE_RULES, ({"moe-to-qmoe": {"accuracy_level": level}},))
        found = self._rewritten(made_once(experts_model, nodes), rules, {"algorithm": "rtn"}, overrides)
        yield from _forms(found, {"QMoE": "moe-to-qmoe"})
        if layout:
            again = self._rewritten(found.ir_model, (({"qmoe-layout": {"layout": layout}},),), {})
            yield from _forms(again, {"QMoE": "qmoe-layout"})

    def _drawn(self, seed: str) -> list[Experts]:
        """Draws the nodes of a plan: another plan changes nothing of them."""
        draw = random.Random(seed)
        return [self._one(draw) for _ in range(NODES)]

    def _one(self, draw: random.Random) -> Experts:
        function = dict(draw.choice(FUNCTIONS))
        top = 2 if "use_sparse_mixer" in function else draw.choice((1, 2, 2, 2, 4))
        function |= {"k": top, "normalize_routing_weights": int(draw.random() < 0.75)}
        types = TYPES[self.target.provider == "cuda" :] + TYPES[:2]
        return (draw.choice(types), draw.choice(self.sizes), function, draw.random() < 0.3, draw.choice((2, 2, 3)))

    def _remade(self) -> Iterator[Written]:
        """MoE from MoE of other halves, and from QMoE."""
        halves = [own for own in FUNCTIONS if own.get("fc3") or own.get("swiglu_fusion") == 2]
        kinds = itertools.product(TYPES, halves, (0, 1), (False, True))
        nodes = {
            f"n{number}": (dtype, (128, 128), {**own, "k": 2, "normalize_routing_weights": normalize}, bias, 2)
            for number, (dtype, own, normalize, bias) in enumerate(kinds)
        }
        made = self._rewritten(made_once(experts_model, nodes), (MOE_RULES,), {})
        yield from _forms(made, {"MoE": "moe-fuse-fc3, swiglu-interleave"}, given="MoE")
        yield from _forms(self._rewritten(_quantized_experts(), (("qmoe-to-moe",),), {}), {"MoE": "qmoe-to-moe"})

    def blocks(self) -> Iterator[Written]:
        """Yields each MoE and QMoE that is written for a whole block."""
        for router in (*ROUTERS, *GIVEN):
            yield from self._block(router)

    def _block(self, router: str) -> Iterator[Written]:
        draw = random.Random(router)  # one more router changes nothing else
        h, i = draw.choice(self.sizes)
        activation = draw.choice(("swiglu", "swiglu", "silu", "relu", "geglu", "squared"))
        dtype = draw.choice(("float32", "float16"))
        own = Spelling(router=router, activation=activation, weights="own", hidden=h, inter=i, dtype=dtype)
        plan = {"bits": draw.choice((4, 8)), "block_size": draw.choice((32, 64)), "algorithm": "rtn"}
        if draw.random() < 0.5:
            plan["symmetric"] = False
        into: object = {"fuse-experts": {"into": "QMoE"}}
        phases = draw.choice(
            (
                ("fuse-experts",),
                ((into,), "moe-to-qmoe"),
                ((into,), "moe-to-qmoe"),
                ("matmul-to-matmul-nbits", "fuse-experts"),
            )
        )
        found = self._rewritten(ir.from_proto(block_model(own)), phases, plan, exclude=NO_ROUTER)
        yield from _forms(found, {"MoE": "fuse-experts", "QMoE": "fuse-experts, moe-to-qmoe"})

    def constants(self) -> Iterator[Written]:
        """Yields each linear map and table that is written."""
        plans = list(itertools.product((2, 4, 8), BLOCKS[1:], (True, False)))
        choices = [(form, own) for own in (None, "auto", "cutlass-sm80", "cutlass-sm90") for form in ("blocks", "flat")]
        for number, (form, layout) in enumerate(choices):
            yield from self._linears(plans[number :: len(choices)], form, layout)

    def _linears(self, plans: list[tuple[int, int, bool]], form: str, layout: str | None) -> Iterator[Written]:
        some = self.target.provider != "cuda" and layout is not None  # its kernels run no bfloat16
        types = TYPES[:2] if some else TYPES
        drawn, overrides = {}, []
        for bits, block, symmetric in plans:
            name = f"b{bits}_{block}_{symmetric}"
            draw = random.Random(name)
            drawn[name] = draw.sample(SIZES, 3), draw.sample(WIDTHS, 2)
            overrides.append({"nodes": f"{name}_*", "bits": bits, "block_size": block, "symmetric": symmetric})
        tie = ({"tie-quantized-embedding": {"form": form, "min_bytes": 0}},)
        gather = ({"gather-to-gather-block-quantized": {"min_bytes": 0}},)
        phases = (tie, gather, ("matmul-to-matmul-nbits", "gemm-to-matmul-nbits"))
        found = self._rewritten(made_once(constants_model, drawn, types), phases, {"algorithm": "rtn"}, overrides)
        yield from _forms(found, CONSTANT_RULES)
        if layout:
            again = self._rewritten(found.ir_model, (({"matmul-nbits-layout": {"layout": layout}},),), {})
            yield from _forms(again, {"MatMulNBits": "matmul-nbits-layout"})

    def _rewritten(
        self, model: ir.Model, phases: Rules, plan: Plan, more: Sequence[Plan] = (), exclude: Sequence[Plan] = ()
    ) -> rewriter.Result:
        named = [
            {"name": f"p{n}", "rules": [own] if isinstance(own, str) else list(own)} for n, own in enumerate(phases)
        ]
        quantization = {"default": dict(plan), "overrides": list(more), "exclude": list(exclude)}
        rules = {
            "description": "A sweep.",
            "phases": named,
            "quantization": quantization,
            "parity": {"local": "none"},
            "rounded_activations": True,
        }
        return rewriter.apply(model, rules, target=str(self.target))


def _forms(result: rewriter.Result, rules: Mapping[str, str], *, given: str = "") -> Iterator[Written]:
    """Yields each node of these operators; of the one that was given too, where a rule fired."""
    fired, named = set(), set()
    if MoEForm.operator in rules:
        report = result.report
        fired = {application.node for application in report.applications}
        named = {misfit.node for misfit in report.misfits}
    for node in result.ir_model.graph:
        if node.op_type in rules and (node.op_type != given or node.name in fired):
            yield Written(rules[node.op_type], of_node(node), node.name in named)


def _expert_plans() -> Iterator[tuple[Plan, ...]]:
    """Yields plans of experts, each as changes of which the last wins."""
    for bits, block, symmetric in itertools.product((2, 4, 8), BLOCKS, (True, False)):
        yield ({"bits": bits, "block_size": block, "symmetric": symmetric},)
    for block in (32, 64, 128):
        yield ({"bits": 3, "block_size": block},)
    for name in ("mxfp4", "nvfp4"):
        yield ({"format": name, "algorithm": "rtn"},)
    for first, second, symmetric in itertools.product((2, 4, 8), (2, 4, 8), (True, False)):
        if first != second:
            block = random.Random(f"{first} {second} {symmetric}").choice(BLOCKS[1:])
            plan = {"bits": first, "block_size": block, "symmetric": symmetric}
            yield plan, {"role": "expert.down", "bits": second}
    for bits in (4, 8):
        yield {"bits": bits, "block_size": 64}, {"role": "expert.down", "symmetric": False}


@functools.cache
def _quantized_experts() -> ir.Model:
    own = Sweep(Target.parse("cpu@1.31"), ((128, 128),))
    drawn = {f"n{number}": one for number, one in enumerate(own._drawn("qmoe-to-moe"))}
    return own._rewritten(made_once(experts_model, drawn), (MOE_RULES, ("moe-to-qmoe",)), {"algorithm": "rtn"}).ir_model


def sweep(answers: Answers) -> Mapping[Form, Written]:
    """Returns each form that is written for the target that answered."""
    target, sizes = target_of(answers), sizes_of(answers)
    own = Sweep(target, sizes)
    experts = *map(target.kernels, ("MoE", "QMoE")), target.takes_router_weights, _has(target, "MoE", "QMoE"), sizes
    linears, tables = (
        (target.linear, _has(target, "MatMulNBits")),
        (target.lookup, _has(target, "GatherBlockQuantized")),
    )
    # Each part with all that rules ask of a target there: where it is equal, they write the same.
    parts = ((own.experts, experts), (own.blocks, (experts, linears)), (own.constants, (linears, tables)))
    found: dict[Form, Written] = {}
    for part, asked in parts:
        key = part.__name__, target.provider, repr(asked)
        if key not in _SWEPT:
            # In a context of its own: that matching changes nothing, other tests of these rules check.
            _SWEPT[key] = contextvars.Context().run(lambda part=part: list(part()))
        for written in _SWEPT[key]:
            found.setdefault(written.form, written)
    return found


_SWEPT: dict[tuple[str, ...], list[Written]] = {}


def _has(target: Target, *operators: str) -> list[bool]:
    return [target.has(operator, name) for operator in operators for name in ADDED[operator]]


def sizes_of(answers: Answers) -> tuple[tuple[int, int], ...]:
    """Returns H and I of the experts that were measured."""
    return tuple(sorted({(own.form.h, own.form.i) for own in answers.answers if isinstance(own.form, QMoEForm)}))


def main() -> None:
    """Prints what is written for a target and not told by what was measured there."""
    patches = [own for own in measured() if str(target_of(own)) in sys.argv[1:]]
    told = [{answer.form for answer in own.answers} for own in patches]
    untold = (form for own in patches[:1] for form in sweep(own) if not all(form in known for known in told))
    sys.stdout.writelines(f"{text_of(form)}\n" for form in untold)


if __name__ == "__main__":
    main()
