"""The README's tables of forms: what the rule sets make of real models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir

import rewriter
from generator.markdown import code, table
from rewriter.errors import ModelError
from rewriter.report import Report

MODELS = Path(__file__).resolve().parents[2] / "tests" / "models"
TARGET = "cpu@1.32"
"""What the tables are for, whatever runtime is installed."""

_OPERATORS = ("MoE", "QMoE", "MatMulNBits", "GatherBlockQuantized")


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
    experts = any(weight.role.startswith("expert") for weight in report.left)
    if about and (experts or "already" in about) and not came.keys() & {"QMoE", "MoE"}:
        parts.append(f"declined: {about.partition(' (rule')[0]}")
    return "; ".join(parts) or "nothing to do"


def _operators(model: ir.Model) -> Counter[str]:
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    nodes = (node for graph in graphs for node in graph.all_nodes())
    return Counter(node.op_type for node in nodes if node.op_type in _OPERATORS)
