"""The pages of targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields

from probe.answers import Answers
from probe.forms import text_of
from probe.sweep import forms

from generator.markdown import code, table
from generator.measured import ROUNDS, RUNS, measured, target_of, told
from generator.verdicts import Verdicts
from rewriter.operators.form import ExpertForm
from rewriter.quantize.formats import INT
from rewriter.quantize.types import QuantizedShape
from rewriter.target import ADDED, KERNELS, LINEARS, LOOKUPS, PROVIDERS, Kernel, LinearKernel, LookupKernel, Target


def kernels() -> str:
    """Returns what each provider's MoE and QMoE run."""
    parts = []
    for provider in PROVIDERS:
        for operator in ("MoE", "QMoE"):
            found = KERNELS.get((provider, operator), ())
            parts.append(f"### {operator} on {provider}\n")
            if not found:
                parts.append("No kernel, so no rule emits it.\n")
            for number, rows in enumerate(found, 1):
                parts += [f"Kernel {number} of {len(found)}:\n"] if len(found) > 1 else []
                versions = ["", *(f"from {row.since[0]}.{row.since[1]}" for row in rows)]
                cells = [
                    [title, *(show(row) for row in rows)]
                    for title, show in _KERNEL_ROWS.items()
                    if operator == "QMoE" or title not in _QMOE_ONLY
                ]
                known = ["known from", *(_known(provider, row.since) for row in rows)]
                parts.append(table(versions, [known, *cells]))
    shown = {f.name for f in fields(Kernel)}
    if shown - {"since"} != _SHOWN:
        raise SystemExit(f"Kernel has other fields than this page shows: {sorted(shown ^ _SHOWN)}")
    return "\n".join(parts)


def experts_on_cpu() -> str:
    """Returns in which widths and blocks each version runs gated experts as one QMoE on the CPU, exactly."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for minor in range(23, 33):
        types: dict[tuple[str, ...], list[str]] = {}
        for dtype in ("FLOAT", "FLOAT16"):
            cells = tuple(_blocks_of(f"cpu@1.{minor}", dtype, bits) for bits in INT.widths)
            types.setdefault(cells, []).append(dtype.lower())
        for cells, own in types.items():
            rows.setdefault((", ".join(own), *cells), []).append(f"1.{minor}")
    body = [[", ".join(versions), *cells] for cells, versions in rows.items()]
    return table(("ONNX Runtime", "x", *(f"{bits} bits" for bits in INT.widths)), body)


def _blocks_of(target: str, dtype: str, bits: int) -> str:
    kernels = Target.parse(target).runs("QMoE", ExpertForm(k=2, activation="swiglu", fusion=1, normalize=True), dtype)
    found: dict[str, list[int]] = {}
    for block in (0, 16, 32, 64, 128, 256):
        for symmetric in (True, False):
            shapes = [QuantizedShape(512, 512, bits, block, symmetric)] * 2
            taken = [] if isinstance(kernels, str) else [k for k in kernels if k.cannot_hold(shapes, "raw") is None]
            if taken:
                exact = any(not kernel.rounds_activations(bits, block) for kernel in taken)
                ends = "" if symmetric else " with zero points"
                found.setdefault(("" if exact else "rounds: ") + ends, []).append(block)
    plain, zero = found.get("", []), found.get(" with zero points", [])
    parts = [_blocks(plain) + (", zero points too" if plain == zero else "")] if plain else []
    parts += [f"with zero points {_blocks(zero)}"] if zero and zero != plain else []
    parts += [f"rounds activations: {_blocks(found['rounds: '])}"] if "rounds: " in found else []
    return "; ".join(parts) or "-"


def _known(provider: str, since: tuple[int, int]) -> str:
    """What a row follows from: a measurement of its first version, or the runtime's own sources."""
    measured_there = any(own.provider == provider and target_of(own).version == since for own in measured())
    return "measured" if measured_there else "stated"


def measurements() -> str:
    """Returns on what and when the prober ran, and how the forms came out."""
    titles = ("provider", "version", "on", "taken", "forms", *_VERDICTS)
    rows = []
    for own in measured():
        counted = Counter(answer.verdict(own.provider) for answer in own.answers)
        counts = (str(counted[verdict]) for verdict in _VERDICTS)
        rows.append([code(own.provider), own.version, own.hardware, own.taken, str(len(own.answers)), *counts])
    return table(titles, rows)


def faults() -> str:
    """Returns what the newest measured version of each provider computes wrongly without an error."""
    newest = {own.provider: own for own in measured()}
    parts = []
    for provider, own in newest.items():
        wrong = [answer for answer in own.answers if answer.verdict(provider) == "wrong"]
        halves = [answer for answer in wrong if answer.form.x != "FLOAT"]
        lines = [f"- `{text_of(answer.form)}`: off by {answer.error:.2g}" for answer in halves]
        shown = lines[:: max(1, len(lines) // 12)][:12]
        parts.append(f"`{provider}` {own.version}, {len(wrong)} in all; some of them:\n\n" + "\n".join(shown) + "\n")
    return "\n".join(parts)


def unmeasured() -> str:
    """Returns what the tables accept on a measured version though no form that has it was run there."""
    lines = []
    for own in measured():
        heads: dict[str, list[str]] = {}
        for part in unmeasured_parts(own):
            head, _, rest = part.partition(": ")
            heads.setdefault(head, []).append(rest)
        lines += [f"- `{own.provider}` {own.version}, {head}: {'; '.join(rest)}\n" for head, rest in heads.items()]
    return "".join(lines)


def unmeasured_parts(own: Answers) -> Collection[str]:
    """Returns the parts of forms that the tables accept and no form has that was measured right."""
    verdicts, target = Verdicts.of([own]), target_of(own)
    accepted = (form for form in forms() if told(target, form) in (RUNS, ROUNDS))
    return dict.fromkeys(part for form in accepted for part in verdicts.unmeasured(form))


_VERDICTS = ("right", "rounds", "wrong", "refused", "fails", "crashes")


def _blocks(sizes: Sequence[int]) -> str:
    return ", ".join("whole row" if size == 0 else str(size) for size in sizes) or "none"


def _rounding(kernel: Kernel) -> str:
    return ", ".join(f"{bits} bits, blocks from {least}" for bits, least in kernel.int8_activations)


_SINGLE = {"any": "yes", "alike": "alike only", "wide": "8 bits, alike only"}
_SHOWN = {
    *("dtypes", "activations", "fusions", "fc3", "sparse_mixer", "unnormalized", "router_weights", "constants"),
    *("format", "blocks", "mixed_bits", "zero_point_blocks", "padded_zero_points", "mixed_zero_points", "single_block"),
    *("multiple", "int8_activations", "layouts", "judges"),
}
_KERNEL_ROWS: dict[str, Callable[[Kernel], str]] = {
    "element types of x": lambda k: ", ".join(k.dtypes).lower(),
    "activations": lambda k: ", ".join(k.activations),
    "`swiglu_fusion`": lambda k: _list(k.fusions),
    "gated by an fc3": lambda k: ", ".join(k.fc3) or "none",
    "`use_sparse_mixer`": lambda k: _yes(k.sparse_mixer),
    "`normalize_routing_weights=0` heeded in": lambda k: ", ".join(k.unnormalized).lower() or "none",
    "SwiGLU constants": lambda k: "the attributes" if k.constants is None else f"fixed: {k.constants}",
    "`router_weights` heeded": lambda k: _ROUTER_WEIGHTS[k.router_weights],
    "codes": lambda k: "integers" if k.format == "int" else k.format,
    "bits and blocks": lambda k: _by_bits(k.blocks or {}),
    "projections of different bits": lambda k: ", ".join(f"{a}/{b}" for a, b in k.mixed_bits) or "no",
    "blocks with zero points": lambda k: _blocks(k.zero_point_blocks),
    "zero points that end within a byte": lambda k: ", ".join(f"{bits} bits" for bits in k.padded_zero_points) or "no",
    "zero points in one projection only": lambda k: _by_bits(k.mixed_zero_points) or "no",
    "a row as one block": lambda k: _SINGLE[k.single_block],
    "H and I a multiple of": lambda k: str(k.multiple),
    "rounds activations to 8 bits": lambda k: (
        ", ".join(f"{b} bits, block >= {n}" for b, n in k.int8_activations) or "no"
    ),
    "layouts": lambda k: ", ".join(k.layouts) or "none",
    "its numbers hold a proof's tolerance": lambda k: _yes(k.judges),
}
_ROUTER_WEIGHTS = {(): "no", (False,): "at `normalize_routing_weights=0`", (True, False): "yes"}
_QMOE_ONLY = tuple(_KERNEL_ROWS)[7:]


def _by_bits(blocks: Mapping[int, Sequence[int]]) -> str:
    """Widths that have the same blocks are shown together."""
    together: dict[tuple[int, ...], list[int]] = {}
    for bits, sizes in blocks.items():
        together.setdefault(tuple(sizes), []).append(bits)
    return "; ".join(f"{_list(bits)}: {_blocks(sizes)}" for sizes, bits in together.items())


def linears() -> str:
    """Returns what each provider's MatMulNBits runs."""
    rows = [
        [
            code(provider),
            _since(row),
            "; ".join(f"{dtype.lower()}: {_list(bits)}" for dtype, bits in row.bits.items()),
            _yes(row.takes_bias),
            _by_bits(row.blocks) or "all",
            ", ".join(row.prepacked) or "raw only",
            _known(provider, row.since),
        ]
        for provider in PROVIDERS
        for row in LINEARS[provider]
    ]
    return table(
        (
            *("provider", "from", "bits by element type of x", "reads the bias", "blocks"),
            *("prepacked layouts", "known from"),
        ),
        rows,
    )


def lookups() -> str:
    """Returns what each provider's GatherBlockQuantized reads."""
    rows = [
        [
            *(code(provider), _since(row), _list(row.bits), ", ".join(row.dtypes).lower()),
            *map(_yes, (row.symmetric, row.padded_zero_points, row.partial_blocks)),
            _known(provider, row.since),
        ]
        for provider in PROVIDERS
        for row in LOOKUPS[provider]
    ]
    titles = ("provider", "from", "bits", "scales", "no zero points", "zero points that end within a byte")
    return table((*titles, "rows that end within a block", "known from"), rows)


def _since(row: LinearKernel | LookupKernel) -> str:
    return f"{row.since[0]}.{row.since[1]}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def attributes() -> str:
    """Returns from which version on an attribute may be written."""
    rows = [
        [code(operator), code(name), f"{since[0]}.{since[1]}"]
        for operator, added in ADDED.items()
        for name, since in added.items()
    ]
    return table(("operator", "attribute", "from ONNX Runtime"), rows)
