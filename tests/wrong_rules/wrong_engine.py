"""Mistakes in the engine itself: between a match and the file that is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import test_commit
import test_commit_constants
from block_models import Spelling, block_model
from embedding_models import graph_of
from mistakes import Mistake
from onnxscript.rewriter import RewriteRuleClassBase
from support import parse, run

import rewriter
from rewriter.tensors.digest import digest_of


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def experts() -> ir.Model:
    """Experts in plain operators: fused, quantized and written as stacks."""
    return ir.from_proto(block_model(Spelling(hidden=32, inter=32, experts=4, weights="own")))


def linears() -> ir.Model:
    """Two products of one shape."""
    weights = {"v": _normal(64, 64), "w": _normal(64, 64, seed=1)}
    return ir.from_proto(
        graph_of("agraph (float[t, 64] x) => (float[t, 64] y) { h = MatMul(x, v) y = MatMul(h, w) }", weights)
    )


def stack() -> ir.Model:
    """A stack of matrices that is read whole and transposed: it becomes a copy."""
    text = 'agraph (float[3, t, 64] x) => (float[3, t, 32] y) { y = Einsum<equation="eti,ehi->eth">(x, w) }'
    return ir.from_proto(graph_of(text, {"w": _normal(3, 32, 64)}))


MODELS = {"experts": (experts, "moe-int4"), "linears": (linears, "rtn"), "stack": (stack, ["einsum-to-matmul"])}
"""Name -> what makes a model, and the rule set that it is rewritten by."""

_FIRST_LIKE = "next(r for w in self.writes[::-1] for r in w.ranges if r.length == place.length)"
_FIRST_SLOT_LIKE = (
    "next(o for o in slots[::-1] if (o.tensor.dtype, o.tensor.shape) == (s.tensor.dtype, s.tensor.shape))"
)
_ONE_EXPERT = "[n.attributes.__setitem__('k', ir.AttrInt64('k', 1)) for n in nodes if 'k' in n.attributes]"
_SCALES_FOR_CODES = "[n.replace_input_with(2, n.inputs[1]) for n in nodes if len(n.inputs) > 2]"
_FIRST_INPUT = "rewrite.nodes[0].replace_input_with(0, self._model.graph.inputs[0])"


@dataclass(frozen=True)
class EngineMistake:
    """A wrong version of a part of the engine.

    Attributes:
        mistake: where it is, and what is wrong.
        model: which of the models shows it.
        sharded: whether it shows where weights go to data files, or where the model is one file.
        caught: what the error says.
        compared: whether the comparison of the whole models catches it, after the file is written.
    """

    mistake: Mistake
    model: str
    sharded: bool
    caught: str = field(repr=False)
    compared: bool = False


def _wrong(
    name: str, path: str, right: str, wrong: str, model: str, sharded: bool, caught: str, *, compared: bool = False
) -> EngineMistake:
    return EngineMistake(
        Mistake("engine", name, path, [(right, wrong)], lambda: None), model, sharded, caught, compared
    )


ENGINE = (
    _wrong(
        "equal-sized tensors crossed in the data file",
        "rewriter/io/writes.py",
        "*(place.file, place.offset,",
        f"*(place.file, {_FIRST_LIKE}.offset,",
        "linears",
        True,
        "does not hold what was computed for it",
    ),
    _wrong(
        "equal-sized tensors crossed in the model file",
        "rewriter/io/inline.py",
        "self.offsets[s.key]",
        f"self.offsets[{_FIRST_SLOT_LIKE}.key]",
        "linears",
        False,
        "does not hold what was computed for it",
    ),
    _wrong(
        "the rows of a part reversed after it was computed",
        "rewriter/quantize/job.py",
        "self._kept = dict(enumerate(arrays))",
        "self._kept = {i: a[::-1] for i, a in enumerate(arrays)}",
        "linears",
        True,
        "differs by",
    ),
    _wrong(
        "a weight laid out right, proved, and handed on wrong as it is written",
        "rewriter/quantize/job.py",
        "    return arrays",
        "    return arrays if job._kept else [a[::-1] for a in arrays]",
        "linears",
        True,
        "as it was written, and of",
    ),
    _wrong(
        "the codes of a stack written in another order than they were computed",
        "rewriter/io/writes.py",
        "place.offset + position * len(data)",
        "place.offset + (len(self.jobs) - 1 - position) * len(data)",
        "experts",
        True,
        "does not hold what was computed for it",
    ),
    _wrong(
        "the scales of the first expert for all",
        "rewriter/quantize/stack.py",
        "part.dtype))[expert] = part",
        "part.dtype))[:] = part",
        "experts",
        True,
        "differs by",
    ),
    _wrong(
        "the first rows of a stack for all, where it is copied into a data file",
        "rewriter/tensors/view.py",
        "self.view.slice(0, row, 1)",
        "self.view.slice(0, 0, 1)",
        "stack",
        True,
        "is not its source's as it was written",
    ),
    _wrong(
        "constants of one shape shared, whatever they hold",
        "rewriter/engine/commit.py",
        'return getattr(tensor, "key", None) or ("view", tensor)',
        "return tensor.dtype, tuple(tensor.shape.numpy())",
        "linears",
        True,
        "would share the constant",
    ),
    _wrong(
        "jobs that differ in their weight taken for equal",
        "rewriter/quantize/job.py",
        "return (self.weight, self.context.spec,",
        "return (self.weight.shape, self.context.spec,",
        "linears",
        True,
        "would share the constant",
    ),
    _wrong(
        "a node that reads another weight in the file",
        "rewriter/io/saving.py",
        "    proto = ir.to_proto(model)",
        "    proto = ir.to_proto(model); proto.graph.node[1].input[1] = proto.graph.node[0].input[1]",
        "linears",
        False,
        "reads or computes other values",
    ),
    _wrong(
        "an output whose declared shape is lost",
        "rewriter/engine/commit.py",
        "new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string",
        "new.type, new.shape, new.doc_string = old.type, None, old.doc_string",
        "linears",
        True,
        "outputs changed",
    ),
    _wrong(
        "an output of another declared type",
        "rewriter/engine/commit.py",
        "new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string",
        "new.type, new.shape, new.doc_string = ir.TensorType(ir.DataType.INT64), old.shape, old.doc_string",
        "linears",
        True,
        "outputs changed",
    ),
    _wrong(
        "an output under a new name",
        "rewriter/engine/commit.py",
        "                    out.name = old.name",
        '                    out.name = f"{old.name}_replaced"',
        "linears",
        True,
        "outputs changed",
    ),
    _wrong(
        "a new constant that is not in the graph",
        "rewriter/engine/commit.py",
        "                    root.register_initializer(home)",
        "                    root.name",
        "experts",
        True,
        "nothing in its scope defines",
    ),
    _wrong(
        "the first of the new nodes left out",
        "rewriter/engine/commit.py",
        "rewrite.graph.insert_before(rewrite.root, nodes)",
        "rewrite.graph.insert_before(rewrite.root, nodes[1:])",
        "experts",
        True,
        "nothing in its scope defines",
    ),
    _wrong(
        "what replaces a value is not read",
        "rewriter/engine/commit.py",
        "            old.replace_all_uses_with(new, replace_graph_outputs=True)",
        "            old.replace_all_uses_with",
        "experts",
        True,
        "still fires",
    ),
    _wrong(
        "an attribute changed after the proof",
        "rewriter/engine/commit.py",
        "        nodes = list(rewrite.nodes)",
        f"        nodes = list(rewrite.nodes); {_ONE_EXPERT}",
        "experts",
        True,
        "is not what was proved",
    ),
    _wrong(
        "scales read in the place of codes after the proof",
        "rewriter/engine/commit.py",
        "        nodes = list(rewrite.nodes)",
        f"        nodes = list(rewrite.nodes); {_SCALES_FOR_CODES}",
        "experts",
        True,
        "cannot run the model",
        compared=True,
    ),
    _wrong(
        "another input read after the proof",
        "rewriter/engine/commit.py",
        "        root = self._roots[rewrite.graph]\n        elsewhere",
        f"        root = self._roots[rewrite.graph]; {_FIRST_INPUT}\n        elsewhere",
        "linears",
        True,
        "far above what was quantized explains",
        compared=True,
    ),
    _wrong(
        "a proof on the float weights",
        "rewriter/parity/proof.py",
        "dequantized(self.before, self.rewrite.jobs, self.before.experts, wide=wide)",
        "{}",
        "experts",
        True,
        "differs by",
    ),
    _wrong(
        "a digest of the first bytes only",
        "rewriter/tensors/digest.py",
        "        self._digest.add(view)",
        "        self._digest.add(view[:8])",
        "stack",
        True,
        "does not hold what was computed for it",
    ),
    _wrong(
        "zeros written",
        "rewriter/tensors/digest.py",
        "self._file.write(view)",
        "self._file.write(bytes(len(view)))",
        "stack",
        True,
        "does not hold what was computed for it",
    ),
    _wrong(
        "a layout that does not read back",
        "rewriter/quantize/job.py",
        "    arrays = stored.pack(quantized)",
        "    arrays = [a[::-1] for a in stored.pack(quantized)]",
        "experts",
        True,
        "do not read back",
    ),
    _wrong(
        "the rows of a weight quantized in reverse",
        "rewriter/quantize/job.py",
        "self.quantizer(weight, self.context)",
        "self.quantizer(weight[::-1], self.context)",
        "experts",
        True,
        "far above what was quantized explains",
        compared=True,
    ),
    _wrong(
        "the report told of another weight",
        "rewriter/quantize/job.py",
        "job.tell(measure(weight, quantized, nbytes, job.context.activations))",
        "job.tell(Measured(nbytes, 0.5))",
        "experts",
        True,
        "as it was written, and of",
    ),
    _wrong(
        "the report told of none",
        "rewriter/quantize/job.py",
        "job.tell(measure(weight, quantized, nbytes, job.context.activations))",
        "job._measured[:] = [measure(weight, quantized, nbytes, None)]",
        "experts",
        True,
        "was written and never quantized",
    ),
    _wrong(
        "the digest of the codes for all parts",
        "rewriter/io/writes.py",
        "                digest.add(data)",
        "                digests[0].add(data)",
        "experts",
        False,
        "does not hold what was computed for it",
    ),
    _wrong(
        "each expert in its neighbour's place",
        "rewriter/quantize/stack.py",
        "packed_arrays(self._jobs[expert], self.stored)",
        "packed_arrays(self._jobs[expert - 1], self.stored)",
        "experts",
        True,
        "differs by",
    ),
    _wrong(
        "one expert twice",
        "rewriter/quantize/stack.py",
        "shared_out(self.compute, range(len(self._jobs)))",
        "shared_out(self.compute, [0, *range(len(self._jobs) - 1)])",
        "experts",
        True,
        "differs by",
    ),
    _wrong(
        "tensors written under one name",
        "rewriter/io/saving.py",
        "swap(slot, Absent(slot.tensor)",
        "swap(slots[0], Absent(slot.tensor)",
        "experts",
        True,
        "does not hold what was computed",
    ),
    _wrong(
        "the first expert read back for all",
        "rewriter/parity/written.py",
        'View.whole(tensor, "").index(0, position).numpy())',
        'View.whole(tensor, "").index(0, 0).numpy())',
        "experts",
        True,
        "as it was written, and of",
    ),
)


@dataclass(frozen=True)
class UnitMistake:
    """A wrong version of a part of the engine that a run of one model need not show.

    Attributes:
        mistake: where it is, and what is wrong.
        check: what fails with it, and passes without.
    """

    mistake: Mistake
    check: Callable[[], object]


def _of_unit(name: str, path: str, right: str, wrong: str, check: Callable[[], object]) -> UnitMistake:
    return UnitMistake(Mistake("engine", name, path, [(right, wrong)], lambda: None), check)


class _Rectify(RewriteRuleClassBase):
    """Relu -> itself, by two nodes."""

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        return op.Max(x, op.Sub(x, x))


class _Swish(RewriteRuleClassBase):
    """A product -> an operator of another domain, of a model that has none."""

    def pattern(self, op, x):
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op, x):
        return op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")


class _Halves(RewriteRuleClassBase):
    """Split -> two slices."""

    def pattern(self, op, x):
        return op.Split(x, axis=-1, num_outputs=2, _outputs=2)

    def rewrite(self, op, x):
        at = [op.initializer(ir.tensor(np.array([i]), name=f"at{i}")) for i in (0, 1, 2)]
        return op.Slice(x, at[0], at[1], at[1]), op.Slice(x, at[1], at[2], at[1])


def _runs_alike(text: str, rule: type[RewriteRuleClassBase]) -> None:
    """The checker accepts what the rule makes of a model, and it computes the same."""
    feeds = {"x": _normal(3, 2)}
    expected = run(parse(text), feeds)
    result = rewriter.apply(parse(text), [rule()], overrides={"parity.local": "none"})
    assert result.report.applications
    actual = run(result.model, feeds)
    assert all(np.allclose(expected[name], actual[name]) for name in expected)


def _in_order() -> None:
    _runs_alike("g (float[t, 2] x) => (float[t, 2] y) { y = Relu(x) }", _Rectify)


def _of_a_domain() -> None:
    _runs_alike("g (float[t, 2] x) => (float[t, 2] y) { s = Sigmoid(x) y = Mul(x, s) }", _Swish)


def _of_two_outputs() -> None:
    text = "g (float[t, 2] x) => (float[t, 1] a, float[t, 1] b) { a, b = Split<axis = -1, num_outputs = 2>(x) }"
    _runs_alike(text, _Halves)


def _digests() -> None:
    one, other = np.arange(3), np.arange(1, 4)
    assert digest_of(one) != digest_of(other)


def _eight_bits() -> None:
    model, rules = MODELS["linears"]
    rewriter.apply(model(), rules, overrides={"quantization.default.bits": 8}, strict=True)


def _experts() -> None:
    model, rules = MODELS["experts"]
    rewriter.apply(model(), rules, strict=True)


UNIT = (
    _of_unit(
        "a digest of nothing",
        "rewriter/tensors/digest.py",
        "        self._so_far = zlib.crc32(part, self._so_far)",
        "        part",
        _digests,
    ),
    _of_unit(
        "names that are taken",
        "rewriter/engine/commit.py",
        "        while name in taken:",
        "        while not taken:",
        test_commit.test_names_are_unique_whatever_is_taken,
    ),
    _of_unit(
        "constants dropped that something reads",
        "rewriter/engine/commit.py",
        "if value.uses() or value.is_graph_output()",
        "if value.is_graph_output()",
        test_commit_constants.test_a_constant_that_lost_its_last_reader_may_gain_another,
    ),
    _of_unit(
        "new nodes the last first",
        "rewriter/engine/commit.py",
        "rewrite.graph.insert_before(rewrite.root, nodes)",
        "rewrite.graph.insert_before(rewrite.root, nodes[::-1])",
        _in_order,
    ),
    _of_unit(
        "a domain that the model does not import",
        "rewriter/engine/commit.py",
        "container.opset_imports.setdefault(domain, version)",
        "container.opset_imports.get(domain, version)",
        _of_a_domain,
    ),
    _of_unit(
        "all outputs read from the first",
        "rewriter/engine/commit.py",
        "            old.replace_all_uses_with(new, replace_graph_outputs=True)",
        "            old.replace_all_uses_with([*outputs.values()][0], replace_graph_outputs=True)",
        _of_two_outputs,
    ),
    _of_unit(
        "nodes removed of which one output is read",
        "rewriter/engine/commit.py",
        "or any(out.uses() or",
        "or all(out.uses() or",
        test_commit.test_a_node_may_lose_one_output_and_keep_the_other,
    ),
    _of_unit(
        "bits left out",
        "rewriter/emit.py",
        '"N": n, "bits": spec.bits, "block_size"',
        '"N": n, "block_size"',
        _eight_bits,
    ),
    _of_unit(
        "every window from the start",
        "rewriter/parity/weights.py",
        "memory[view.offset - first :]",
        "memory[0:]",
        _experts,
    ),
)
"""Found by what is checked of one part. That 4 bits are left out shows nowhere: it is what the operator assumes."""
