"""What ``rewriter.apply`` returns: the rewritten model and its report, ``save`` and ``check``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import onnx
import onnx_ir as ir

from rewriter import io
from rewriter.graph.contents import Slot
from rewriter.io.identity import looked_whole
from rewriter.memory import set_aside
from rewriter.parity.model import ModelParity, check
from rewriter.parity.runtime import Feeds, Runtime
from rewriter.quantize.lossless import OffGridError
from rewriter.report import Report
from rewriter.ruleset import RuleSet

if TYPE_CHECKING:
    from distributed import Client

M = TypeVar("M", ir.Model, onnx.ModelProto)
Written = TypeVar("Written")


@dataclass
class Result(Generic[M]):
    """A rewritten model.

    Attributes:
        ir_model: the rewritten model; its new weights are computed when they are read or written.
        rule_set: what was run.
        nodes_before: how many nodes the given model has.
    """

    ir_model: ir.Model
    rule_set: RuleSet
    _report: Callable[[], Report]
    _inspect: Callable[[Sequence[Slot], ir.Model], None]
    _original: io.Model
    _again: Callable[[], Result[M]]
    _identity: Mapping[str, str] | None
    _saved: Path | None = None
    _parity: ModelParity | None = None
    _files: int = 0
    nodes_before: int = 0

    @property
    def model(self) -> M:
        """The rewritten model, of the kind that was given (a path gives an ``onnx_ir.Model``).

        Raises:
            ModelError: it is to be a ModelProto and exceeds 2 GB; ``save`` has no such limit.
        """
        if not isinstance(self._original, onnx.ModelProto):
            return self.ir_model  # type: ignore[return-value]  # M is what was given
        return self._written(lambda: io.to_proto(self.ir_model))

    def _written(self, write: Callable[[], Written]) -> Written:
        """Writes; where a weight is off the grid on which its sample lay, all are looked at whole and written anew."""
        with set_aside():
            try:
                return write()
            except OffGridError:
                again = self._again()
                self.ir_model, self._report, self._inspect = again.ir_model, again._report, again._inspect
                self._identity = again._identity
                return write()

    @property
    def _from_folder(self) -> bool:
        return isinstance(self._original, str | os.PathLike) and Path(self._original).is_dir()

    @property
    def report(self) -> Report:
        """What was done; complete, with an error for every weight, once the model is saved."""
        found = replace(self._report(), files_after=self._files)
        return found if self._parity is None else replace(found, parity=self._parity.comparison)

    def __repr__(self) -> str:
        """Sums it up: a model may have ten thousand nodes."""
        return f"<Result: {self.report!r}>"

    def _repr_html_(self) -> str:
        """Shows the report in a notebook."""
        from rewriter.html import fragment  # noqa: PLC0415 -- a template engine that only a person's report needs

        return fragment(self.report)

    def save(
        self,
        path: str | os.PathLike[str] | io.Place,
        *,
        overwrite: bool = False,
        resume: bool = False,
        cluster: Client | None = None,
        memory: int | None = None,
        max_shard_size: int | None = None,
        data_name: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Writes the model into a directory, whole or not at all, a few weights in memory at a time.

        Where a directory was given as the model, its other files (tokenizer, configuration) are copied.

        Args:
            path: the directory; or ``directory/name.onnx``, to name the file; or the place, looked at before.
            overwrite: replace files of the same names in the directory; no other file there is touched.
            resume: go on where a run into the directory ended that was killed, if model and options are the same, and
                leave what was written where this one is interrupted. The model must have been given as a path.
            cluster: a ``dask.distributed.Client``: its workers quantize, copy and read back what lies in data files.
                They must see input and output under the same paths, and run the same version.
            memory: bytes of weights in flight.
            max_shard_size: bytes after which a new data file is begun.
            data_name: of the data file, as ``model.onnx_data``; by default ``<name>.data``.
            progress: told bytes done and bytes in all.

        Returns:
            The ``.onnx`` file.

        Raises:
            UsageError: the directory exists, or cannot be written; or the killed run was of another model, rule set,
                option or version, which it names.
            QuantizationError: a weight is not finite; nothing is left behind.
            ParityError: what was written is not what was computed; nothing is left behind.
        """
        place = path if isinstance(path, io.Place) else io.Place.of(path, overwrite=overwrite, resume=resume)
        source = io.source_path(self.ir_model)
        name = place.name or (source.name if source is not None else None)
        names: set[str] = set()

        def look(given: Sequence[Slot], written: ir.Model) -> None:
            names.update(io.data_names(written))
            self._inspect(given, written)

        def write() -> Path:
            if self._identity is not None and looked_whole(place.leftover(name or "")) > looked_whole(self._identity):
                raise OffGridError("the killed run found a weight off the grid on which its sample lay")
            return io.save(
                self.ir_model,
                place,
                name=name,
                identity=self._identity,
                cluster=cluster,
                memory=memory,
                max_shard_size=max_shard_size,
                data_name=data_name,
                progress=progress,
                copy_others_from=source if self._from_folder else None,
                inspect=look,
            )

        self._saved = self._written(write)
        self._files = io.bytes_on_disk(self._saved, names)
        return self._saved

    def check(self, feeds: Feeds | None = None, *, runtime: Runtime | None = None) -> ModelParity:
        """Runs the original and the rewritten model on the same inputs; the report then holds how they compare.

        A saved model is run from its file; an unsaved one is computed in memory for this.

        Args:
            feeds: inputs by name; by default random ones, seeded as the rule set's ``parity`` says.
            runtime: by default ONNX Runtime on the CPU.

        Raises:
            TargetError: the runtime cannot run one of the two.
            UsageError: the feeds do not fit, or the runtime is not installed.
        """
        seed = self.rule_set.parity.seed
        self._parity = self._written(
            lambda: check(self._original, self._saved or self.ir_model, feeds=feeds, seed=seed, runtime=runtime)
        )
        return self._parity
