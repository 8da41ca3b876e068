"""The YAML format as pydantic models, strict."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from rewriter.errors import nearest
from rewriter.quantize import plan
from rewriter.quantize.formats import FormatName
from rewriter.quantize.lossless import NAME as LOSSLESS
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset.faults import fault, validated
from rewriter.ruleset.fields import Algorithm, Layers, Names, Ratio, RuleField, exact
from rewriter.ruleset.model import LocalParity, ParitySettings, Phase, RuleSet
from rewriter.ruleset.source import Source


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                message = f"unknown key '{key}'{nearest(str(key), cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "{message}", {"message": message, "key": key})
        return value

    def given(self) -> dict[str, Any]:
        """Returns the fields that the document wrote, and none of the defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class PhaseDocument(_Strict):
    """Rules that run together until none of them fires."""

    name: Annotated[str, Field(min_length=1)]
    """Replaces the phase of the same name in what this rule set extends."""
    rules: Annotated[list[RuleField], Field(min_length=1)]
    """In the order in which they are tried at a node."""
    max_sweeps: Annotated[int, Field(ge=1)] = Phase.max_sweeps
    """A phase that still fires after so many sweeps is an error."""


class SpecDocument(_Strict):
    """How weights are quantized."""

    algorithm: Algorithm = WeightSpec.algorithm
    """Built-in algorithm, or `custom` for a function given in Python; `lossless` may stand before another in a list."""
    bits: Annotated[plan.Bits, exact(plan.Bits)] = WeightSpec.bits  # type: ignore[assignment]  # held by exact()
    """Bits per weight."""
    block_size: Annotated[plan.BlockSize, exact(plan.BlockSize)] = WeightSpec.block_size  # type: ignore[assignment]  # likewise
    """Input features that share a scale; 0 is a whole row, which only QMoE has: others take their longest blocks."""
    symmetric: bool = WeightSpec.symmetric
    """True for no zero points."""
    format: FormatName = WeightSpec.format
    """What codes are: integers, or `mxfp4` and `nvfp4`, which have 4 bits and blocks of 32 and 16."""

    def given(self) -> dict[str, Any]:
        """Returns the fields that the document wrote; a list of algorithms as the last of them, lossless or not."""
        found = super().given()
        if "algorithm" in found:
            *first, found["algorithm"] = found["algorithm"].split(" ")
            found["lossless"] = LOSSLESS in (*first, found["algorithm"])
        return found


class SelectorDocument(_Strict):
    """Picks weights: each field that is given must match, by any of its entries."""

    nodes: Names = Field(default_factory=list)
    """Globs on node names; each must match something in the model."""
    weights: Names = Field(default_factory=list)
    """Globs on weight names; each must match something in the model."""
    role: Names = Field(default_factory=list)
    """Globs on roles, such as `expert.*`; the model may have none of them."""
    layers: Layers = Field(default_factory=tuple)
    """Layers: `5`, `0-3`, `24-`, `sensitive` (more bits by llama.cpp's rule), or a list; may match nothing."""

    @model_validator(mode="after")
    def _selects(self) -> SelectorDocument:
        if not self.model_fields_set & SelectorDocument.model_fields.keys():
            raise fault(f"selects nothing: give one of {', '.join(SelectorDocument.model_fields)}")
        return self

    def selector(self, where: str) -> plan.Selector:
        return plan.Selector(tuple(self.nodes), tuple(self.weights), tuple(self.role), self.layers, where)


def _without_defaults(schema: dict[str, Any]) -> None:
    for entry in schema["properties"].values():
        entry.pop("default", None)


class OverrideDocument(SelectorDocument, SpecDocument):
    """Changes how the selected weights are quantized; later overrides win."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    @model_validator(mode="after")
    def _changes(self) -> OverrideDocument:
        if not self.changes():
            raise fault(f"changes nothing: give one of {', '.join(SpecDocument.model_fields)}")
        return self

    def changes(self) -> dict[str, Any]:
        given = self.given()
        return {name: given[name] for name in (*SpecDocument.model_fields, "lossless") if name in given}


class QuantizationDocument(_Strict):
    """The quantization plan."""

    default: SpecDocument = Field(default_factory=SpecDocument)
    """For a weight that no override selects; merged field by field with what this rule set extends."""
    include: list[SelectorDocument] = Field(default_factory=list)
    """Only these weights are quantized; empty for all. Added to those of what this rule set extends."""
    exclude: list[SelectorDocument] = Field(default_factory=list)
    """These weights stay float. Added to those of what this rule set extends."""
    drop: list[SelectorDocument] = Field(default_factory=list)
    """Entries of `include` and `exclude` of what this rule set extends that hold no more, as they are written there."""
    overrides: list[OverrideDocument] = Field(default_factory=list)
    """Appended to those of what this rule set extends."""


class ParityDocument(_Strict):
    """How the result is proved; merged field by field with what this rule set extends."""

    local: Annotated[LocalParity, exact(LocalParity)] = ParitySettings.local
    """Which rewrites are proved by running them: one to four of each structural class, all, or none."""
    seed: Annotated[int, Field(ge=0)] = ParitySettings.seed
    """Of the random inputs."""
    max_bytes: Annotated[int, Field(ge=0)] = ParitySettings.max_bytes
    """Of one rewrite's weights in float32 above which it is not run whole: of a stack some experts are."""
    max_relative_l2: Ratio | None = ParitySettings.max_relative_l2
    """Largest relative L2 error of an output of the whole model."""
    min_snr_db: Annotated[float, Field(allow_inf_nan=False)] | None = ParitySettings.min_snr_db
    """Smallest signal-to-noise ratio of an output of the whole model, in dB."""
    min_top1: Annotated[float, Field(ge=0, le=1)] | None = ParitySettings.min_top1
    """Smallest share of positions, 0 to 1, whose highest logit stays the same."""
    timeout: Annotated[float, Field(gt=0, le=1_000_000)] = ParitySettings.timeout
    """Seconds that one run of a proof, or of a whole model that ``apply`` compares, may take."""


class RuleSetDocument(_Strict):
    """A rule set of onnx-moe-rewriter."""

    description: str = RuleSet.description
    """One sentence."""
    extends: Names = Field(default_factory=list)
    """Rule sets to start from, by name or file; later ones win."""
    target: Annotated[str, Field(min_length=1)] = RuleSet.target
    """Runtime to rewrite for."""
    rounded_activations: bool = RuleSet.rounded_activations
    """Whether fused experts may be written where the target's kernel rounds activations to 8 bits."""
    accuracy_level: Annotated[plan.AccuracyLevel, exact(plan.AccuracyLevel)] = RuleSet.accuracy_level
    """Of every MatMulNBits and QMoE: 0 leaves it to the runtime; 4 lets the CPU round activations to 8 bits."""
    phases: list[PhaseDocument] = Field(default_factory=list)
    """Run one after the other."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of rules by id, in every phase that lists the rule; the others stay as they are there."""
    quantization: QuantizationDocument = Field(default_factory=QuantizationDocument)
    """Which weights are quantized, and how."""
    parity: ParityDocument = Field(default_factory=ParityDocument)
    """How the result is proved."""


_KINDS = {str: "text", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
"""How messages call what is no mapping: its content is not theirs to print, the file may be any."""


def read(source: Source) -> RuleSetDocument:
    """Validates a source as a rule set.

    Raises:
        RuleSetError: the first fault, at its place.
    """
    if not isinstance(source.data, dict):
        raise source.error((), f"a rule set is a mapping, not {_KINDS.get(type(source.data), 'a value')}")
    return validated(source, (), lambda: RuleSetDocument.model_validate(source.data))
