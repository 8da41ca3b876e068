"""What rules write for a target over a sweep of models and plans, as the forms that the prober measures.

``python tests/target/emission.py cpu@1.31`` prints those of which ``rewriter/target/measured`` tells nothing yet, one a
line, for the prober's ``--forms``.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "rules"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "prober"))
sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import onnx_ir as ir
from block_models import GIVEN, ROUTERS, Spelling, block_model
from generator.measured import measured, target_of
from node_forms import of_node
from probe.answers import Answers
from probe.forms import Form, QMoEForm, text_of
from sweep_models import TYPES, Experts, constants_model, experts_model

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
NO_ROUTER = ({"role": "router"},)


@dataclass(frozen=True)
class Written:
    """A node that was written.

    Attributes:
        rule: which wrote it.
        form: of the node.
        named: whether the report says that the target does not compute it.
    """

    rule: str
    form: Form
    named: bool = False


@dataclass(frozen=True)
class Sweep:
    """The models and plans that the rules are given for one target.

    Attributes:
        target: the target.
        sizes: H and I of experts, which were measured.
        draw: chooses what is combined with what.
    """

    target: Target
    sizes: tuple[tuple[int, int], ...]
    draw: random.Random

    def written(self) -> Iterator[Written]:
        """Yields each node that is written."""
        for plan, more in self._expert_plans():
            yield from self._experts(plan, more)
        yield from self._remade()
        for index, router in enumerate((*ROUTERS, *GIVEN)):
            # One more router, or one more plan, changes nothing else.
            yield from replace(self, draw=random.Random(router))._blocks(router, ("float32", "float16")[index % 2])
        for bits, block, symmetric in itertools.product((2, 4, 8), BLOCKS[1:], (True, False)):
            plan = {"bits": bits, "block_size": block, "symmetric": symmetric, "algorithm": "rtn"}
            yield from replace(self, draw=random.Random(str(plan)))._constants(plan)

    def _expert_plans(self) -> Iterator[tuple[Plan, tuple[Plan, ...]]]:
        for bits, block, symmetric in itertools.product((2, 4, 8), BLOCKS, (True, False)):
            yield {"bits": bits, "block_size": block, "symmetric": symmetric}, ()
        for block in (32, 64, 128):
            yield {"bits": 3, "block_size": block}, ()
        for name in ("mxfp4", "nvfp4"):
            yield {"format": name}, ()
        for first, second, symmetric in itertools.product((2, 4, 8), (2, 4, 8), (True, False)):
            if first != second:
                plan = {"bits": first, "block_size": self.draw.choice(BLOCKS[1:]), "symmetric": symmetric}
                yield plan, ({"role": "expert.down", "bits": second},)
        for bits in (4, 8):
            yield {"bits": bits, "block_size": 64}, ({"role": "expert.down", "symmetric": False},)

    def _experts(self, plan: Plan, more: tuple[Plan, ...]) -> Iterator[Written]:
        model = experts_model([self._drawn() for _ in range(NODES)])
        plan = plan if "format" in plan else plan | {"algorithm": "rtn"}
        level = self.draw.choice((0, 0, 4))
        rules = (MOE_RULES, ({"moe-to-qmoe": {"accuracy_level": level}},))
        found = self._rewritten(model, rules, plan, more)
        yield from self._forms("moe-to-qmoe", found, "QMoE")
        if level == 0:
            layout = self.draw.choice(("raw", "cutlass-sm80", "columns", "auto"))
            again = self._rewritten(found.ir_model, (({"qmoe-layout": {"layout": layout}},),), plan)
            yield from self._forms("qmoe-layout", again, "QMoE")

    def _drawn(self) -> Experts:
        function = dict(self.draw.choice(FUNCTIONS))
        top = 2 if "use_sparse_mixer" in function else self.draw.choice((1, 2, 2, 2, 4))
        function |= {"k": top, "normalize_routing_weights": int(self.draw.random() < 0.75)}
        types = TYPES[self.target.provider == "cuda" :] + TYPES[:2]
        return (
            self.draw.choice(types),
            self.draw.choice(self.sizes),
            function,
            self.draw.random() < 0.3,
            self.draw.choice((2, 2, 3)),
        )

    def _remade(self) -> Iterator[Written]:
        """MoE from MoE of other halves, and from QMoE."""
        halves = [own for own in FUNCTIONS if own.get("fc3") or own.get("swiglu_fusion") == 2]
        nodes = [
            (dtype, (128, 128), {**own, "k": 2, "normalize_routing_weights": normalize}, bias, 2)
            for dtype, own, normalize, bias in itertools.product(TYPES, halves, (0, 1), (False, True))
        ]
        made = self._rewritten(experts_model(nodes), (MOE_RULES,), {})
        yield from self._applied("moe-fuse-fc3, swiglu-interleave", made)
        own = Sweep(Target.parse("cpu@1.31"), ((128, 128),), self.draw)
        drawn = experts_model([own._drawn() for _ in range(NODES)])
        quantized = own._rewritten(drawn, (MOE_RULES, ("moe-to-qmoe",)), {"algorithm": "rtn"}).ir_model
        yield from self._applied("qmoe-to-moe", self._rewritten(quantized, (("qmoe-to-moe",),), {}))

    def _blocks(self, router: str, dtype: str) -> Iterator[Written]:
        h, i = self.draw.choice(self.sizes)
        activation = self.draw.choice(("swiglu", "swiglu", "silu", "relu", "geglu", "squared"))
        own = Spelling(router=router, activation=activation, weights="own", hidden=h, inter=i, dtype=dtype)
        model = ir.from_proto(block_model(own))
        plan = {"bits": self.draw.choice((4, 8)), "block_size": self.draw.choice((32, 64)), "algorithm": "rtn"}
        if self.draw.random() < 0.5:
            plan["symmetric"] = False
        into: object = {"fuse-experts": {"into": "QMoE"}}
        phases = self.draw.choice(
            (
                ("fuse-experts",),
                ((into,), "moe-to-qmoe"),
                ((into,), "moe-to-qmoe"),
                ("matmul-to-matmul-nbits", "fuse-experts"),
            )
        )
        found = self._rewritten(model, phases, plan, exclude=NO_ROUTER)
        yield from self._forms("fuse-experts", found, "MoE")
        yield from self._forms("fuse-experts, moe-to-qmoe", found, "QMoE")

    def _constants(self, plan: Plan) -> Iterator[Written]:
        """Linear maps and tables."""
        linears = ("matmul-to-matmul-nbits", "gemm-to-matmul-nbits")
        tie = ({"tie-quantized-embedding": {"form": self.draw.choice(("blocks", "flat")), "min_bytes": 0}},)
        gather = ({"gather-to-gather-block-quantized": {"min_bytes": 0}},)
        model = constants_model(self.draw.sample(SIZES, 3), self.draw.sample(WIDTHS, 2))
        found = self._rewritten(model, (tie, gather, linears), plan)
        yield from self._forms(
            "gather-to-gather-block-quantized, tie-quantized-embedding", found, "GatherBlockQuantized"
        )
        yield from self._forms("matmul-, gemm-to-matmul-nbits, tie-quantized-embedding", found, "MatMulNBits")
        if self.draw.random() < 0.5:
            layout = self.draw.choice(("auto", "cutlass-sm80", "cutlass-sm90"))
            again = self._rewritten(found.ir_model, (({"matmul-nbits-layout": {"layout": layout}},),), plan)
            yield from self._forms("matmul-nbits-layout", again, "MatMulNBits")

    def _rewritten(
        self, model: ir.Model, phases: Rules, plan: Plan, more: tuple[Plan, ...] = (), exclude: tuple[Plan, ...] = ()
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

    def _forms(self, rule: str, result: rewriter.Result, operator: str) -> Iterator[Written]:
        named = {misfit.node for misfit in result.report.misfits}
        for node in result.ir_model.graph:
            if node.op_type == operator:
                yield Written(rule, of_node(node), node.name in named)

    def _applied(self, rule: str, result: rewriter.Result) -> Iterator[Written]:
        """The MoE that are not the given ones."""
        fired = {application.node for application in result.report.applications}
        named = {misfit.node for misfit in result.report.misfits}
        for node in result.ir_model.graph:
            if node.op_type == "MoE" and node.name in fired:
                yield Written(rule, of_node(node), node.name in named)


def sweep(answers: Answers) -> Mapping[Form, Written]:
    """Returns each form that is written for the target that answered."""
    target = target_of(answers)
    has = tuple(target.has(operator, name) for operator, names in ADDED.items() for name in names)
    experts = (target.kernels("MoE"), target.kernels("QMoE"), target.takes_router_weights)
    asked = repr((target.provider, experts, target.linear, target.lookup, has, sizes_of(answers)))
    if asked not in _SWEPT:  # all that rules ask of a target: where it is equal, they write the same
        draw = random.Random(12)
        found: dict[Form, Written] = {}
        for own in Sweep(target, sizes_of(answers), draw).written():
            found.setdefault(own.form, own)
        _SWEPT[asked] = found
    return _SWEPT[asked]


_SWEPT: dict[str, Mapping[Form, Written]] = {}


def sizes_of(answers: Answers) -> tuple[tuple[int, int], ...]:
    """Returns H and I of the experts that were measured."""
    return tuple(sorted({(own.form.h, own.form.i) for own in answers.answers if isinstance(own.form, QMoEForm)}))


def main() -> None:
    """Prints what is written for a target and not told by what was measured there."""
    for own in measured():
        if str(target_of(own)) in sys.argv[1:]:
            told = {answer.form for answer in own.answers}
            sys.stdout.writelines(f"{text_of(form)}\n" for form in sweep(own) if form not in told)


if __name__ == "__main__":
    main()
