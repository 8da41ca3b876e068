"""Writes the generated parts of the documentation: ``python docs/generate.py``; with ``--check`` it only compares.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the rest is written by hand.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import yaml

import rewriter
from rewriter.cli import main as command_line
from rewriter.errors import ModelError
from rewriter.quantize.job import PartTensor
from rewriter.report import Report
from rewriter.roles import __doc__ as roles_doc
from rewriter.ruleset import load
from rewriter.ruleset.catalogue import OptionInfo, RuleInfo, catalogue
from rewriter.ruleset.load import rule_sets
from rewriter.ruleset.model import RuleSet
from rewriter.ruleset.schema import json_schema
from rewriter.target import ADDED, KERNELS, LINEARS, LOOKUPS, PROVIDERS, Kernel, LinearKernel, LookupKernel

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MODELS = ROOT / "tests" / "models"
GRANITE = "tests/models/mobius/granitemoehybrid_static_unroll_f32.onnx"
TARGET = "cpu@1.31"
"""What the README's tables are for, whatever runtime is installed."""
OWN = "rules"
"""The package whose rules and sets are documented; others that are installed are not."""

_PART = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_OPERATORS = ("MoE", "QMoE", "MatMulNBits", "GatherBlockQuantized")


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(text: object) -> str:
    """Returns text as code, in one line."""
    return f"`{text}`"


# Rules


def own_rules() -> list[RuleInfo]:
    """Returns the rules that this project ships."""
    return [info for info in catalogue() if info.package == OWN]


def own_sets() -> dict[str, RuleSet]:
    """Returns the rule sets that this project ships, each with what it extends."""
    return {name: load(name) for name, info in rule_sets().items() if info.package == OWN}


def rules_index() -> str:
    """Returns a table of the rules, each with the sets that list it themselves."""
    users: dict[str, list[str]] = {info.name: [] for info in own_rules()}
    for name in own_sets():
        phases = _document(name).get("phases", [])
        listed = (
            entry if isinstance(entry, str) else next(iter(entry)) for phase in phases for entry in phase["rules"]
        )
        for rule in dict.fromkeys(listed):
            users[rule].append(f"[{name}](rule-sets.md#{name})")
    rows = [[f"[{i.name}](#{i.name})", _prose(i.title), ", ".join(users[i.name]) or "none"] for i in own_rules()]
    return table(("rule", "what it does", "listed in"), rows)


def rules_catalogue() -> str:
    """Returns every rule in full."""
    return "\n".join(_rule(info) for info in own_rules())


def _rule(info: RuleInfo) -> str:
    module = f"{info.name.replace('-', '_')}.py"
    parts = [f"## {info.name}\n", f"{_prose(info.title)} ([source](../{OWN}/{module}))\n"]
    for title, body in info.sections.items():
        if title == "Declines when":
            listed = "".join(f"- {_prose(line)}\n" for line in _joined(body))
            parts.append(f"{title}:\n\n{listed}")
        elif title == "Source":
            parts.append(f"{title}: {_prose(' '.join(body.split()))}\n")
        else:
            parts.append(f"{title}:\n\n```text\n{body.replace('``', '')}\n```\n")
    if info.options:
        rows = [[code(o.name), code(o.type), code(_yaml(o.default)), _prose(_said(o))] for o in info.options]
        parts.append(f"Options:\n\n{table(('option', 'type', 'default', 'meaning'), rows)}")
    else:
        parts.append("It has no options.\n")
    return "\n".join(parts)


def _said(option: OptionInfo) -> str:
    if not option.description:
        raise SystemExit(f"option '{option.name}' has no line in the Args of its rule function")
    return option.description


def _joined(body: str) -> list[str]:
    """One line per guard; a guard may go on in an indented line."""
    lines: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and lines:
            lines[-1] += f" {line.strip()}"
        elif line.strip():
            lines.append(line.strip())
    return lines


def _prose(text: str) -> str:
    return text.replace("``", "`").replace("<", "&lt;") if "``" not in text else text.replace("``", "`")


def _yaml(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


# Rule sets


def schema_reference() -> str:
    """Returns the keys of a rule set, from its JSON Schema."""
    schema = json_schema(rules=False)
    definitions = schema["$defs"]
    parts = [("A rule set", schema)]
    named = {
        "An entry of `phases`": "PhaseDocument",
        "`quantization`": "QuantizationDocument",
        "`quantization.default`": "SpecDocument",
        "A selector: an entry of `include` or `exclude`": "SelectorDocument",
        "An entry of `overrides`: a selector and the values that it changes": "OverrideDocument",
        "`parity`": "ParityDocument",
    }
    if set(named.values()) != set(definitions):
        raise SystemExit(f"the schema has other parts than this page names: {sorted(definitions)}")
    parts += [(title, definitions[name]) for title, name in named.items()]
    return "\n".join(f"### {title}\n\n{_keys(part)}" for title, part in parts)


def _keys(part: Mapping[str, Any]) -> str:
    required = part.get("required", ())
    rows = [
        [
            code(name),
            _type(entry),
            "required" if name in required else code(_yaml(entry["default"])) if "default" in entry else "-",
            entry.get("description", ""),
        ]
        for name, entry in part["properties"].items()
    ]
    return table(("key", "type", "default", "meaning"), rows)


def _type(entry: Mapping[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(code(_yaml(value).strip('"')) for value in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_type(option) for option in entry["anyOf"]))
    if "$ref" in entry or entry.get("type") == "object":
        return "mapping"
    if entry.get("type") == "array":
        inner = _type(entry["items"])
        return f"list of {inner if 'or' not in inner else f'({inner})'}"
    return str(entry.get("type", "any"))


def sets_index() -> str:
    """Returns a table of the shipped rule sets."""
    sets = own_sets()
    return table(("rule set", "what it promises"), [[f"[{n}](#{n})", s.description] for n, s in sets.items()])


def readme_sets() -> str:
    """Returns the same table with links that work from the README."""
    return sets_index().replace("](#", "](docs/rule-sets.md#")


def sets_catalogue() -> str:
    """Returns every shipped rule set: its file, and what it comes to with all that it extends."""
    infos = rule_sets()
    return "\n".join(_set(name, Path(infos[name].path), rule_set) for name, rule_set in own_sets().items())


def _set(name: str, path: Path, rule_set: RuleSet) -> str:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# yaml-language")]
    phases = "; ".join(
        f"{phase.name}: {', '.join(f'[{r.name}](rules.md#{r.name}){_changed(r.options, r.name)}' for r in phase.rules)}"
        for phase in rule_set.phases
    )
    spec = rule_set.plan.default
    zero = "symmetric" if spec.symmetric else "with zero points"
    facts = [f"Runs {phases}."]
    if "quantization" in _effective(name):
        facts.append(f"Weights: {spec.bits} bits, blocks of {spec.block_size}, {zero}, `{spec.algorithm}`.")
    facts += [f"Only {selector}." for selector in rule_set.plan.include]
    facts += [f"Except {selector}." for selector in rule_set.plan.exclude]
    facts += [
        f"Override for {o.selector}: {', '.join(f'{k} {_yaml(v)}' for k, v in o.changes.items())}."
        for o in rule_set.plan.overrides
    ]
    listed = "".join(f"- {fact}\n" for fact in facts)
    text = "\n".join(lines)
    return f"### {name}\n\n{rule_set.description}\n\n```yaml\n{text}\n```\n\nWith all that it extends:\n\n{listed}"


def _effective(name: str) -> set[str]:
    """Keys that the set, or one that it extends, writes."""
    document = _document(name)
    bases = document.get("extends", [])
    inherited = [_effective(base) for base in ([bases] if isinstance(bases, str) else bases)]
    return set(document).union(*inherited)


def _document(name: str) -> dict[str, Any]:
    """What the file of a shipped set holds."""
    document: dict[str, Any] = yaml.safe_load(Path(rule_sets()[name].path).read_text(encoding="utf-8"))
    return document


def _changed(options: Mapping[str, object], rule: str) -> str:
    defaults = {option.name: option.default for info in own_rules() if info.name == rule for option in info.options}
    changed = [f"{key}: {_yaml(value)}" for key, value in options.items() if value != defaults[key]]
    return f" ({', '.join(changed)})" if changed else ""


def roles() -> str:
    """Returns the names of the roles, as the code describes them."""
    paragraphs = (roles_doc or "").split("\n\n")
    return "\n\n".join(_prose(p) for p in paragraphs if p.startswith(("Roles:", "Layer:"))) + "\n"


# Targets


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
        [code(provider), _since(row), "; ".join(f"{dtype.lower()}: {_list(b)}" for dtype, b in row.bits.items())]
        + [_yes(row.takes_bias)]
        for provider in PROVIDERS
        for row in LINEARS[provider]
    ]
    return table(("provider", "from", "bits by element type of x", "reads the bias"), rows)


def lookups() -> str:
    """Returns what each provider's GatherBlockQuantized reads."""
    rows = [
        [code(provider), _since(row), _list(row.bits), ", ".join(row.dtypes).lower()]
        + [_yes(row.symmetric), _yes(row.padded_zero_points), _yes(row.partial_blocks)]
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


# What a reader of the README sees


def selections() -> str:
    """Returns how one expert's matrix may be taken from its stack, and what becomes of it."""
    rows = []
    for title, body in _SELECTIONS.items():
        result = rewriter.apply(_selection(body), "moe-int4", target=TARGET)
        rows.append([title, _outcome(_selection(body), result.ir_model, result.report)])
    return table(("an expert's matrix is taken by", "`moe-int4` makes of it"), rows)


def _selection(body: str) -> ir.Model:
    """Two experts' products with x, their matrices taken from the stack W."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[T, 32] x, int64 i) => (float[T, 32] y) <{_CONSTANTS}> {{\n{body}\n y = Add(a, b) }}"
    )
    weights = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    stack = model.graph.initializers["W"]
    stack.const_value = ir.tensor(weights, name="W")
    return model


_CONSTANTS = ", ".join(
    [
        "float[2, 32, 32] W = {" + ", ".join(["0"] * 2048) + "}",
        "int64 zero = {0}",
        "int64 one = {1}",
        "int64[1] z = {0}",
        "int64[1] o = {1}",
        "int64[1] t = {2}",
        "int64[2] e1 = {1, -1}",
        "int64[1] flat = {1}",
        "int64[2] m = {32, 32}",
    ]
)
_SELECTIONS = {
    "`Gather(stack, e)`, `Transpose`": """
        g0 = Gather <axis = 0> (W, zero)  t0 = Transpose <perm = [1, 0]> (g0)  a = MatMul(x, t0)
        g1 = Gather <axis = 0> (W, one)   t1 = Transpose <perm = [1, 0]> (g1)  b = MatMul(x, t1)""",
    "`Gather(stack, [e])`, `Squeeze`": """
        g0 = Gather <axis = 0> (W, z)  s0 = Squeeze(g0, z)  a = MatMul(x, s0)
        g1 = Gather <axis = 0> (W, o)  s1 = Squeeze(g1, z)  b = MatMul(x, s1)""",
    "`Split(stack)`, `Squeeze`": """
        p0, p1 = Split <axis = 0, num_outputs = 2> (W)
        s0 = Squeeze(p0, z)  a = MatMul(x, s0)
        s1 = Squeeze(p1, z)  b = MatMul(x, s1)""",
    "`Slice(stack, e, e + 1)`, `Reshape`": """
        p0 = Slice(W, z, o, z)  s0 = Reshape(p0, m)  a = MatMul(x, s0)
        p1 = Slice(W, o, t, z)  s1 = Reshape(p1, m)  b = MatMul(x, s1)""",
    "`SplitToSequence(stack)`, `SequenceAt(e)`": """
        q = SplitToSequence <axis = 0, keepdims = 0> (W)
        s0 = SequenceAt(q, zero)  a = MatMul(x, s0)
        s1 = SequenceAt(q, one)   b = MatMul(x, s1)""",
    "`Gather(stack, e)`, `Gemm` with `transB`": """
        g0 = Gather <axis = 0> (W, zero)  a = Gemm <transB = 1> (x, g0)
        g1 = Gather <axis = 0> (W, one)   b = Gemm <transB = 1> (x, g1)""",
    "`Gather(stack, i)`, i a graph input": """
        g0 = Gather <axis = 0> (W, i)  a = MatMul(x, g0)
        b = Identity(a)""",
}


_FORMS = {
    "experts unrolled, static `Gather`": ("mobius", "mobius/granitemoehybrid_static_unroll_f32.onnx"),
    "experts unrolled by indexing in Python": (
        "torch.onnx (dynamo)",
        "torch_unroll/getitem_matmul_T__dynamo18_opt_f16.onnx",
    ),
    "experts unrolled, gpt-oss": ("transformers' exporter", "hf_exporter/gpt_oss__default.onnx"),
    "matrices gathered by run-time index, batched `MatMul`": (
        "transformers' exporter",
        "hf_exporter/mixtral__batched_mm.onnx",
    ),
    "a loop over the experts that were hit": ("torch.onnx (TorchScript)", "hf_blocks/qwen3_moe__eager__ts17.onnx"),
    "`MoE`, SwiGLU in fc1": ("ONNX Runtime GenAI", "genai/lfm2_moe_fp32_cpu.onnx"),
    "`MoE`, gpt-oss' clamped SwiGLU": ("ONNX Runtime GenAI", "genai/gpt_oss_fp32_cpu.onnx"),
    "`MoE` with an fc3": ("transformers' exporter, fused by ONNX Runtime", "hf_exporter/qwen3_moe__ortcuda.onnx"),
    "`MoE` with `geglu` (Gemma 4)": ("ONNX Runtime GenAI", "genai/gemma4_moe_fp32_cpu_b32.onnx"),
    "`MoE`, as mobius writes Gemma 4": ("mobius", "mobius/gemma4_fused_moe_head_f32.onnx"),
    "`QMoE`": ("ONNX Runtime GenAI", "genai/gpt_oss_int4_cpu_b32.onnx"),
    "`MoE` with inputs missing": ("mobius, before its fix", "mobius/gemma4_fused_moe_pre324_malformed_f32.onnx"),
    "every expert a `MatMulNBits`": ("mobius", "mobius/qwen3_moe_dense_ortq4.onnx"),
    "dense, tied embedding": ("mobius", "mobius/llama_tied_dense_f32.onnx"),
}
_FORM_SETS = ("moe-int4", "fuse-experts")


def forms() -> str:
    """Returns how exporters write a block, and what the rule sets make of the models in the tests that hold it."""
    rows = []
    for title, (exporter, file) in _FORMS.items():
        cells = [_applied(MODELS / file, rules) for rules in _FORM_SETS]
        rows.append([f"[{title}](tests/models/{file})", exporter, *cells])
    return table(("as exported", "by", *map(code, _FORM_SETS)), rows)


def _applied(path: Path, rules: str) -> str:
    try:
        result = rewriter.apply(path, rules, target=TARGET)
    except ModelError:
        return "refused: invalid"
    return _outcome(ir.load(path), result.ir_model, result.report)


def _outcome(before: ir.Model, after: ir.Model, report: Report) -> str:
    """What came; and where experts stay float, why."""
    came = _operators(after) - _operators(before)
    parts = [f"{count} `{op}`" for op, count in sorted(came.items(), key=lambda item: _OPERATORS.index(item[0]))]
    why = dict(reversed(report.declined))
    about = next((why[rule] for rule in ("moe-to-qmoe", "fuse-experts", "unstack") if rule in why), "")
    if about and (_holds_float_stack(after) or "already" in about) and not came.keys() & {"QMoE", "MoE"}:
        parts.append(f"declined: {about.partition(' (rule')[0]}")
    return "; ".join(parts) or "nothing to do"


def _holds_float_stack(model: ir.Model) -> bool:
    """Whether experts are left in float: a large constant of three dimensions that is no part of a quantized weight."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return any(
        t is not None and not isinstance(t, PartTensor) and len(t.shape) > 2 and t.nbytes > 4096 for t in tensors
    )


def _operators(model: ir.Model) -> Counter[str]:
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    nodes = (node for graph in graphs for node in graph.all_nodes())
    return Counter(node.op_type for node in nodes if node.op_type in _OPERATORS)


def quick_start() -> str:
    """Returns what the README's first command prints, without the comparison of outputs, which varies by machine."""
    with tempfile.TemporaryDirectory() as folder:
        text = printed(
            [
                "apply",
                "tests/models/mobius/granitemoehybrid_static_unroll_f32.onnx",
                "-o",
                f"{folder}/out",
                "--no-check",
            ]
        )
    kept = [line.replace(f"{folder}/", "") for line in text.splitlines() if not line.startswith("Not compared")]
    return f"```text\n{re.sub(chr(10) + '{3,}', chr(10) * 2, chr(10).join(kept))}\n```\n"


def picture() -> str:
    """Returns the HTML report's picture, once there is one."""
    return "![The HTML report](docs/report.png)\n" if (ROOT / "docs" / "report.png").exists() else ""


def printed(arguments: Sequence[str], width: int = 110) -> str:
    """Returns what a command of ``rewriter`` prints.

    Raises:
        SystemExit: it fails.
    """
    out = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
            status = command_line(list(arguments))
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    if status:
        raise SystemExit(f"rewriter {' '.join(arguments)} failed ({status})")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


PARTS: Mapping[str, Callable[[], str]] = {
    "attributes": attributes,
    "forms": forms,
    "kernels": kernels,
    "linears": linears,
    "lookups": lookups,
    "picture": picture,
    "quick-start": quick_start,
    "readme-sets": readme_sets,
    "roles": roles,
    "rules": rules_catalogue,
    "rules-index": rules_index,
    "schema": schema_reference,
    "selections": selections,
    "sets": sets_catalogue,
    "sets-index": sets_index,
}


def generated(text: str) -> str:
    """Returns a page with its generated parts written anew.

    Raises:
        SystemExit: a part has no generator.
    """

    def part(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        if name not in PARTS:
            raise SystemExit(f"nothing generates '{name}'")
        return f"{begin}\n{PARTS[name]()}\n{end}"

    return _PART.sub(part, text)


def main(check: bool) -> int:
    """Writes the pages that changed, or says which would.

    Args:
        check: whether to write nothing.

    Returns:
        The exit code: 1 where a page is stale and was only checked.
    """
    stale = 0
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = generated(old)
        if new != old:
            stale += 1
            sys.stdout.write(f"{'stale' if check else 'wrote'}: {page.relative_to(ROOT)}\n")
            if not check:
                page.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))
