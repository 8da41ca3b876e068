"""The pages of targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from generator.markdown import code, table

from rewriter.target import ADDED, KERNELS, LINEARS, LOOKUPS, PROVIDERS, Kernel, LinearKernel, LookupKernel


def kernels() -> str:
    """Returns what each provider's MoE and QMoE run."""
    parts = []
    for provider in PROVIDERS:
        for operator in ("MoE", "QMoE"):
            rows = KERNELS.get((provider, operator), ())
            if not rows:
                parts.append(f"### {operator} on {provider}\n\nNo kernel, so no rule emits it.\n")
                continue
            versions = ["", *(f"from {row.since[0]}.{row.since[1]}" for row in rows)]
            cells = [
                [title, *(show(row) for row in rows)]
                for title, show in _KERNEL_ROWS.items()
                if operator == "QMoE" or title not in _QMOE_ONLY
            ]
            parts.append(f"### {operator} on {provider}\n\n{table(versions, cells)}")
    shown = {f.name for f in fields(Kernel)}
    if shown - {"since"} != _SHOWN:
        raise SystemExit(f"Kernel has other fields than this page shows: {sorted(shown ^ _SHOWN)}")
    return "\n".join(parts)


def _blocks(sizes: Sequence[int]) -> str:
    return ", ".join("whole row" if size == 0 else str(size) for size in sizes) or "none"


def _layout(layout: int | None) -> str:
    return "raw" if layout is None else f"CUTLASS sm{layout}"


def _rounding(kernel: Kernel) -> str:
    return ", ".join(f"{bits} bits, blocks from {least}" for bits, least in kernel.int8_activations)


_SINGLE = {"any": "yes", "alike": "alike only", "never": "no"}
_SHOWN = {
    *("dtypes", "activations", "fusions", "fc3", "sparse_mixer", "unnormalized", "constants", "blocks"),
    *(
        "zero_point_blocks",
        "single_block",
        "mixed_zero_points",
        "mixed_bits",
        "multiple",
        "int8_activations",
        "layouts",
    ),
}
_KERNEL_ROWS: dict[str, Callable[[Kernel], str]] = {
    "element types of x": lambda k: ", ".join(k.dtypes).lower(),
    "activations": lambda k: ", ".join(k.activations),
    "`swiglu_fusion`": lambda k: ", ".join(map(str, k.fusions)),
    "gated by an fc3": lambda k: ", ".join(k.fc3) or "none",
    "`use_sparse_mixer`": lambda k: "yes" if k.sparse_mixer else "no",
    "`normalize_routing_weights=0` heeded in": lambda k: ", ".join(k.unnormalized).lower() or "none",
    "SwiGLU constants": lambda k: "the attributes" if k.constants is None else f"fixed: {k.constants}",
    "bits and blocks": lambda k: "; ".join(f"{b}: {_blocks(s)}" for b, s in (k.blocks or {}).items()),
    "blocks with zero points": lambda k: _blocks(k.zero_point_blocks),
    "a row as one block": lambda k: _SINGLE[k.single_block],
    "zero points in one projection only": lambda k: "yes" if k.mixed_zero_points else "no",
    "projections of different bits": lambda k: "yes" if k.mixed_bits else "no",
    "H and I a multiple of": lambda k: str(k.multiple),
    "rounds activations to 8 bits": lambda k: (
        ", ".join(f"{b} bits, block >= {n}" for b, n in k.int8_activations) or "no"
    ),
    "layouts": lambda k: ", ".join(map(_layout, k.layouts)) or "none",
}
_QMOE_ONLY = tuple(_KERNEL_ROWS)[7:]


def linears() -> str:
    """Returns what each provider's MatMulNBits runs."""
    rows = [
        [
            code(provider),
            _since(row),
            "; ".join(f"{dtype.lower()}: {_list(bits)}" for dtype, bits in row.bits.items()),
            _yes(row.takes_bias),
        ]
        for provider in PROVIDERS
        for row in LINEARS[provider]
    ]
    return table(("provider", "from", "bits by element type of x", "reads the bias"), rows)


def lookups() -> str:
    """Returns what each provider's GatherBlockQuantized reads."""
    rows = [
        [
            *(code(provider), _since(row), _list(row.bits), ", ".join(row.dtypes).lower()),
            *map(_yes, (row.symmetric, row.padded_zero_points, row.partial_blocks)),
        ]
        for provider in PROVIDERS
        for row in LOOKUPS[provider]
    ]
    titles = ("provider", "from", "bits", "scales", "no zero points", "zero points that end within a byte")
    return table((*titles, "rows that end within a block"), rows)


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
