"""Which weight gets which bits: a default, what is included and excluded, and overrides of which the last wins."""

from __future__ import annotations

import difflib
import glob
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from rewriter import quantize
from rewriter.errors import RuleSetError, nearest
from rewriter.graph.declines import Reason
from rewriter.quantize.formats import FORMATS, FormatName
from rewriter.quantize.types import WeightSpec

Bits = Literal[2, 3, 4, 8]
BlockSize = Literal[0, 16, 32, 64, 128, 256]
AccuracyLevel = Literal[0, 1, 2, 3, 4]
"""Of the operators: 0 leaves it to the runtime, 4 lets kernels round activations to 8 bits."""
CUSTOM = "custom"
"""The algorithm id that stands for a user's own function."""

_LAYERS = re.compile(r"(\d+)(-(\d+)?)?", re.ASCII)
_MOST_LAYERS = 999_999
_SPECIAL = frozenset("*?[")
_HINTS = 10
_SEPARATORS = re.compile(r"([/.])")


def algorithms() -> tuple[str, ...]:
    """Returns the algorithm ids that a plan may name: the built-in ones and ``custom``."""
    return (*sorted(quantize.ALGORITHMS), CUSTOM)


SENSITIVE: Literal["sensitive"] = "sensitive"
"""The layers that ``is_sensitive`` says."""

Layers = range | Literal["sensitive"]


def is_sensitive(layer: int, count: int) -> bool:
    """Whether llama.cpp's mixed types give a layer of ``count`` more bits: first and last eighth, and each third."""
    eighth = count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2


def parse_layers(value: object) -> tuple[Layers, ...]:
    """Parses layers: ``5``, ``"0-3"`` (both ends included), ``"24-"`` (to the last), ``sensitive``, or a list of those.

    Raises:
        ValueError: says what is not a layer range.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    if not parts:
        raise ValueError("is empty")
    return tuple(_parse_range(part) for part in parts)


def _parse_range(part: object) -> Layers:
    if isinstance(part, range):
        return part
    if part == SENSITIVE:
        return SENSITIVE
    text = str(part) if isinstance(part, str) or (type(part) is int and 0 <= part <= 10 * _MOST_LAYERS) else ""
    found = _LAYERS.fullmatch(text.replace(" ", ""))
    if found is None:
        raise ValueError(f"has no layer range in {part!r} (write 5, '0-3', '24-' or 'sensitive')")
    if max(len(digits or "") for digits in found.group(1, 3)) > len(str(_MOST_LAYERS)):
        raise ValueError(f"has a layer past {_MOST_LAYERS:,}, which no model has")
    first = int(found[1])
    last = int(found[3]) if found[3] else sys.maxsize - 1 if found[2] else first
    if last < first:
        raise ValueError(f"has the range {part!r}, which ends before it begins")
    return range(first, last + 1)


def _show_range(layers: Layers) -> str:
    if isinstance(layers, str):
        return layers
    if layers.stop == sys.maxsize:
        return f"{layers.start}-"
    return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"{layers.start}"


@dataclass(frozen=True)
class Selector:
    """Picks weights: each field that is given must match, by any one of its entries.

    Attributes:
        nodes: globs on the name of the node that reads the weight (``*``, ``?``, ``[ab]``; case counts).
        weights: globs on the name of the weight.
        role: globs on its role.
        layers: ranges of layer indices, or the sensitive layers; a weight outside of any layer is in none of them.
        where: place in the source that wrote it, for messages.
    """

    nodes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    role: tuple[str, ...] = ()
    layers: tuple[Layers, ...] = ()
    where: str = field(default="", compare=False)

    def matches(
        self, *, node: str, weight: str, role: str, layer: int | None, also: Collection[str] = (), count: int = 0
    ) -> bool:
        """Says whether the weight is picked, by its own name or by one that it also goes by."""
        return (
            _any_glob(self.nodes, node)
            and any(_any_glob(self.weights, name) for name in (weight, *also))
            and _any_glob(self.role, role)
            and (not self.layers or (layer is not None and any(_holds(part, layer, count) for part in self.layers)))
        )

    def __str__(self) -> str:
        layers = tuple(_show_range(layers) for layers in self.layers)
        parts = (("node", self.nodes), ("weight", self.weights), ("role", self.role), ("layer", layers))
        return ", ".join(f"{kind} {' or '.join(entries)}" for kind, entries in parts if entries) or "everything"


@dataclass(frozen=True)
class Override:
    """Changes some fields of the spec of the weights that the selector picks.

    Raises:
        RuleSetError: a change is not a field of WeightSpec, or its value is not allowed.
    """

    selector: Selector
    changes: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check(self.changes)


class Picking(NamedTuple):
    """The lines of a plan that pick one weight, by their indices."""

    include: tuple[int, ...]
    exclude: tuple[int, ...]
    overrides: tuple[int, ...]


class LineUse(NamedTuple):
    """What one line of a plan came to in a model.

    Attributes:
        weights: how many it picks.
        overruled: for how many of them other lines decide all that it says: later overrides, or that they stay float.
    """

    weights: int
    overruled: int


@dataclass(frozen=True)
class UnmatchedGlob:
    """A glob on node or weight names, or on roles, that matched nothing; as text, the whole message."""

    kind: Literal["node", "weight", "role"]
    glob: str
    where: str
    hint: str

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        nothing = "matches no role" if self.kind == "role" else "matches nothing in the model"
        return f"{place}{self.kind} pattern '{self.glob}' {nothing}{self.hint}"


@dataclass(frozen=True)
class QuantizationPlan:
    """The spec of each weight, or the reason why it stays float.

    Attributes:
        default: spec of a weight that no override picks.
        include: a weight must be picked by one of these; empty includes everything.
        exclude: a weight picked by one of these stays float.
        overrides: changes to the default, in order; later ones win.

    Raises:
        RuleSetError: a value in the default is not allowed.
    """

    default: WeightSpec = field(default_factory=WeightSpec)
    include: tuple[Selector, ...] = ()
    exclude: tuple[Selector, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        _check({entry.name: getattr(self.default, entry.name) for entry in fields(self.default)})

    @cached_property
    def _overrides(self) -> tuple[Mapping[str, Sequence[int]], Sequence[int]]:
        """Indices of the overrides by the names that they are about, and of those that may be about any name."""
        by_name: dict[str, list[int]] = {}
        others = []
        for index, override in enumerate(self.overrides):
            names = override.selector.weights or override.selector.nodes
            if not names or any(map(_is_pattern, names)):
                others.append(index)
            for name in names if others[-1:] != [index] else ():
                by_name.setdefault(name, []).append(index)
        return by_name, others

    @property
    def _selectors(self) -> tuple[Selector, ...]:
        return (*self.include, *self.exclude, *(override.selector for override in self.overrides))

    @cached_property
    def asks_for_names(self) -> bool:
        """Whether any of its globs means nodes or weights by their names."""
        return any(selector.nodes or selector.weights for selector in self._selectors)

    def named(self, seen: Iterable[tuple[str, str]]) -> QuantizationPlan:
        """Returns the plan for a model: a pattern that equals a name in it means that name, whatever it holds.

        Args:
            seen: (node name, weight name), either of which may be empty.
        """
        patterns = {name for pair in seen for name in pair if _is_pattern(name)}

        def exact(selector: Selector) -> Selector:
            nodes, weights = (
                tuple(glob.escape(name) if name in patterns else name for name in names)
                for names in (selector.nodes, selector.weights)
            )
            return replace(selector, nodes=nodes, weights=weights)

        if not patterns:
            return self
        return replace(
            self,
            include=tuple(map(exact, self.include)),
            exclude=tuple(map(exact, self.exclude)),
            overrides=tuple(replace(override, selector=exact(override.selector)) for override in self.overrides),
        )

    def resolve(
        self, *, node: str, weight: str, role: str, layer: int | None, also: Collection[str] = (), count: int = 0
    ) -> WeightSpec | str:
        """Returns the weight's spec, or the reason why it stays float; arguments as those of ``picking``."""
        return self.decide(self.picking(node=node, weight=weight, role=role, layer=layer, also=also, count=count), role)

    def picking(
        self, *, node: str, weight: str, role: str, layer: int | None, also: Collection[str] = (), count: int = 0
    ) -> Picking:
        """Returns which lines of the plan pick a weight.

        Args:
            node: name of the node that reads the weight.
            weight: name of the weight.
            role: what it is for.
            layer: index of its layer, or None.
            count: number of layers of the model.
            also: names that it goes by too: of the stack of which it is one expert, of what it is stored as.
        """
        about = (role, layer, count, *((node, weight, *also) if self.asks_for_names else ()))
        found = self._pickings.get(about)
        if found is None:
            found = self._pickings[about] = self._picking(node, weight, role, layer, also, count)
        return found

    @cached_property
    def _pickings(self) -> dict[tuple[object, ...], Picking]:
        """What was found: the experts of a layer are picked by the same lines, where none asks for names."""
        return {}

    def _picking(
        self, node: str, weight: str, role: str, layer: int | None, also: Collection[str], count: int
    ) -> Picking:
        def picks(selector: Selector) -> bool:
            return selector.matches(node=node, weight=weight, role=role, layer=layer, also=also, count=count)

        by_name, others = self._overrides
        near = {*others, *(index for name in {node, weight, *also} for index in by_name.get(name, ()))}
        return Picking(
            tuple(index for index, selector in enumerate(self.include) if picks(selector)),
            tuple(index for index, selector in enumerate(self.exclude) if picks(selector)),
            tuple(index for index in sorted(near) if picks(self.overrides[index].selector)),
        )

    def decide(self, picking: Picking, role: str) -> WeightSpec | str:
        """Returns the spec of a weight that these lines pick, or the reason why it stays float."""
        if self.include and not picking.include:
            helps = "add its role or name to quantization.include of the rule set"
            return Reason(f"not included by the plan ({f'role {role}' if role else 'no role'})", helps, expected=True)
        for index in picking.exclude:
            helps = "take its role or name out of quantization.exclude of the rule set"
            return Reason(f"excluded by the plan ({self.exclude[index]})", helps, expected=True)
        if picking.overrides not in self._specs:
            self._specs[picking.overrides] = self._overridden(picking.overrides)
        return self._specs[picking.overrides]

    @cached_property
    def _specs(self) -> dict[tuple[int, ...], WeightSpec]:
        """The spec that some overrides make: a plan of few lines is asked for that of many thousand weights."""
        return {}

    def _overridden(self, overrides: Sequence[int]) -> WeightSpec:
        changes: dict[str, Any] = {}
        for index in overrides:
            changes.update(self.overrides[index].changes)
        spec = replace(self.default, **changes)
        own = FORMATS[spec.format]
        if own.block is None:
            return spec
        return replace(spec, bits=own.widths[0], block_size=own.block, symmetric=True)

    def use(self, pickings: Iterable[Picking]) -> dict[tuple[str, int], LineUse]:
        """Counts what each line is about and what it does not decide.

        Args:
            pickings: one for each weight that a rule would quantize.

        Returns:
            By kind (``default``, ``include``, ``exclude``, ``override``) and index.
        """
        lines = [("default", 0)]
        for kind, entries in (("include", self.include), ("exclude", self.exclude), ("override", self.overrides)):
            lines += [(kind, index) for index in range(len(entries))]
        picked, overruled = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for picking in pickings:
            stays = bool(picking.exclude or (self.include and not picking.include))
            picked["default", 0] += not stays
            picked.update(("include", index) for index in picking.include)
            picked.update(("exclude", index) for index in picking.exclude)
            said: set[str] = set()
            for index in reversed(picking.overrides):
                changes = self.overrides[index].changes.keys()
                picked["override", index] += 1
                overruled["override", index] += stays or changes <= said
                said |= changes
        return {line: LineUse(picked[line], overruled[line]) for line in lines}

    def unmatched(self, seen: Iterable[tuple[str, str]], roles: Collection[str]) -> list[UnmatchedGlob]:
        """Returns the globs that match nothing; a role may be absent from the model, and layers may match nothing.

        Args:
            seen: (node name, weight name) of every weight that the plan was, or could be, asked for.
            roles: every role that there is, in whatever model.
        """
        pairs = list(seen)
        nodes = {node for node, _ in pairs}
        weights = {weight for _, weight in pairs}
        unmatched: list[UnmatchedGlob] = []
        for selector in self._selectors:
            asked: tuple[tuple[Literal["node", "weight", "role"], Sequence[str], Collection[str]], ...] = (
                ("node", selector.nodes, nodes),
                ("weight", selector.weights, weights),
                ("role", selector.role, roles),
            )
            for kind, globs, names in asked:
                for text in globs:
                    if text not in names and not (_is_pattern(text) and any(fnmatchcase(n, text) for n in names)):
                        hint = _closest_glob(text, sorted(names)) if len(unmatched) < _HINTS else ""
                        unmatched.append(UnmatchedGlob(kind, text, selector.where, hint))
        return unmatched


def _holds(part: Layers, layer: int, count: int) -> bool:
    return is_sensitive(layer, count) if isinstance(part, str) else layer in part


def _is_pattern(text: str) -> bool:
    return not _SPECIAL.isdisjoint(text)


def _any_glob(globs: Sequence[str], name: str) -> bool:
    return not globs or any(fnmatchcase(name, text) for text in globs)


def _closest_glob(text: str, names: Sequence[str]) -> str:
    """Replaces the parts of the glob that no name has by the closest that one has; a hint only if that matches."""
    known = {part for name in names for part in _SEPARATORS.split(name)}
    parts = _SEPARATORS.split(text)
    for i, part in enumerate(parts):
        if part not in known and not _is_pattern(part):
            parts[i] = next(iter(difflib.get_close_matches(part, sorted(known), n=1)), part)
    closest = "".join(parts)
    return f" (did you mean '{closest}'?)" if any(fnmatchcase(name, closest) for name in names) else ""


def _check(changes: Mapping[str, Any]) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "algorithm": algorithms(),
        "bits": get_args(Bits),
        "block_size": get_args(BlockSize),
        "symmetric": (True, False),
        "format": get_args(FormatName),
        "lossless": (True, False),
    }
    for name, value in changes.items():
        if name not in allowed:
            raise RuleSetError(f"unknown field '{name}' of a weight's quantization{nearest(name, allowed)}")
        if not any(type(value) is type(valid) and value == valid for valid in allowed[name]):
            valid = ", ".join(map(str, allowed[name]))
            raise RuleSetError(f"'{name}' of a weight's quantization is {value!r} (valid: {valid})")
