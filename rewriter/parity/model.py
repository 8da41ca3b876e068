"""Two whole models on the same inputs: how far their outputs are apart."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from rewriter import io
from rewriter.errors import ParityError, TargetError, UsageError
from rewriter.graph.contents import total_bytes
from rewriter.io.messages import from_proto
from rewriter.io.reading import model_file
from rewriter.parity.metrics import compare
from rewriter.parity.model_inputs import random_inputs
from rewriter.parity.runtime import Array, Feeds, OrtRuntime, Runtime
from rewriter.report import Comparison, Metrics


class OriginalError(TargetError):
    """The first of two models does not run."""


_IN_MEMORY = 1 << 30


@dataclass(frozen=True)
class ModelParity:
    """How the outputs of two models differ on one set of inputs.

    Attributes:
        runtime: what ran them.
        seed: of the random inputs; None for inputs that were given.
        outputs: by output name, in the order of the model.
    """

    runtime: str
    seed: int | None
    outputs: Mapping[str, Metrics]

    @property
    def comparison(self) -> Comparison:
        """The same as a report holds it."""
        return Comparison(self.runtime, self.seed, self.outputs)

    @property
    def worst(self) -> str:
        """Name of the output with the largest relative L2 difference."""
        return max(self.outputs, key=lambda name: self.outputs[name].relative_l2)

    @property
    def relative_l2(self) -> float:
        """Largest relative L2 difference of any output."""
        return max((m.relative_l2 for m in self.outputs.values()), default=0.0)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any output."""
        return max((m.max_abs for m in self.outputs.values()), default=0.0)

    @property
    def cosine(self) -> float:
        """Smallest cosine of any output."""
        return min((m.cosine for m in self.outputs.values()), default=1.0)

    @property
    def snr_db(self) -> float:
        """Smallest signal-to-noise ratio of any output, in dB."""
        return min((m.snr_db for m in self.outputs.values()), default=float("inf"))

    @property
    def top1(self) -> float | None:
        """Smallest top-1 agreement of any logits; None where there are none."""
        return min((m.top1 for m in self.outputs.values() if m.top1 is not None), default=None)

    @property
    def kl(self) -> float | None:
        """Largest KL divergence of any logits; None where there are none."""
        return max((m.kl for m in self.outputs.values() if m.kl is not None), default=None)


def check(
    before: io.Model,
    after: io.Model,
    *,
    feeds: Feeds | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
    logits: Collection[str] | None = None,
) -> ModelParity:
    """Runs two models, one after the other, on the same inputs.

    Args:
        before: what is expected; as for ``rewriter.apply``.
        after: what is measured against it.
        feeds: inputs by name; by default random ones that fit ``before``.
        seed: of the random inputs.
        runtime: by default ONNX Runtime on the CPU.
        logits: outputs to compare as logits; by default those named so.

    Raises:
        ParityError: the models' inputs or outputs differ in name, dtype or shape.
        ModelError: a model cannot be read.
        TargetError: the runtime cannot run a model.
        UsageError: the feeds do not fit, or the runtime is not installed.
    """
    before, after = io.held(before), io.held(after)
    first, second = read(before), read(after)
    check_interface(first, second)
    if feeds is None:
        given: int | None = seed
        feeds = random_inputs(first, seed)
    else:
        given = None
        _check_feeds(first, feeds)
    runtime = runtime or OrtRuntime()
    results: list[dict[str, Array]] = []
    for source, model in ((before, first), (after, second)):
        with runnable(source, model) as whole:
            try:
                results.append(runtime.run(whole, feeds))
            except TargetError as error:
                raise error if results else OriginalError(str(error)) from error
    expected, actual = results
    outputs = {}
    for name, value in expected.items():
        as_logits = name in logits if logits is not None else name.rpartition(".")[2] == "logits"
        try:
            outputs[name] = compare(value, actual[name], logits=as_logits)
        except ParityError as error:
            raise ParityError(f"output '{name}': {error}") from error
    return ModelParity(runtime.name, given, outputs)


def read(model: io.Plain) -> ir.Model:
    """Returns a model in memory, its weights where they are."""
    if isinstance(model, ir.Model):
        return model
    return from_proto(model) if isinstance(model, onnx.ModelProto) else io.load(model)


@contextlib.contextmanager
def runnable(source: io.Plain, model: ir.Model) -> Iterator[onnx.ModelProto | Path]:
    """What a runtime can take: a file, or a message where it is small."""
    if isinstance(source, onnx.ModelProto):
        yield source
    elif not isinstance(source, ir.Model):
        yield model_file(Path(source))
    elif total_bytes(model) <= _IN_MEMORY:
        yield io.to_proto(model)
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield io.save(model, Path(directory) / "model")


def check_interface(before: ir.Model, after: ir.Model) -> None:
    """Raises a ParityError where two models differ in their inputs or outputs."""
    for what, first, second in (
        ("inputs", _inputs(before), _inputs(after)),
        ("outputs", _described(before.graph.outputs), _described(after.graph.outputs)),
    ):
        names = first.keys() | second.keys()
        differing = sorted(
            n for n in names if first.get(n) != second.get(n) and "unknown" not in (first.get(n), second.get(n))
        )
        if differing:
            listed = ", ".join(f"'{n}' ({first.get(n, 'absent')} -> {second.get(n, 'absent')})" for n in differing)
            raise ParityError(f"the two models cannot be compared, since their {what} differ: {listed}")


def _inputs(model: ir.Model) -> dict[str, str]:
    return _described(v for v in model.graph.inputs if v.name not in model.graph.initializers)


def _described(values: Collection[ir.Value] | Iterator[ir.Value]) -> dict[str, str]:
    return {v.name or "": v.dtype.name if v.dtype is not None else "unknown" for v in values}


def _check_feeds(model: ir.Model, feeds: Feeds) -> None:
    if not isinstance(feeds, Mapping):
        raise UsageError(f"feeds are arrays by input name, not {type(feeds).__name__}")
    wanted = _inputs(model).keys()
    missing, unknown = sorted(wanted - feeds.keys()), sorted(feeds.keys() - {v.name for v in model.graph.inputs})
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"unknown: {', '.join(unknown)}"] if unknown else []
        raise UsageError(f"the inputs given do not fit the model ({'; '.join(parts)})")
