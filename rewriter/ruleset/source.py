"""Where a rule set's data comes from, and how to point at a part of it: ``file:line:column`` for YAML."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rewriter.errors import RuleSetError

Location = Sequence[str | int]
"""Keys and indices from the root of the data, as pydantic reports them."""


@dataclass(frozen=True)
class Source:
    """Plain data with the means to say where each part of it was written.

    Attributes:
        label: the file, or what else the data is called in messages.
        data: what the YAML says, as plain Python.
        folder: what a relative path in it is relative to; None where files cannot be named (a shipped set).
        root: the YAML node of the whole document, or None for data that was no YAML.
    """

    label: str
    data: object
    folder: Path | None
    root: yaml.Node | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """Equal for two readings of the same source."""
        return self.label if self.folder is None else str((self.folder / Path(self.label).name).resolve())

    def where(self, location: Location = (), *, key: bool = False) -> str:
        """Returns the place of the deepest part of the location that exists: of its value, or of its key."""
        if self.root is None:
            return f"{self.label} {_dotted(location)}" if location else self.label
        node = self.root
        mark = node.start_mark
        for part in location:
            step = _step(node, part)
            if step is None:
                break
            name, node = step
            mark = name.start_mark if key else node.start_mark
        return f"{self.label}:{mark.line + 1}:{mark.column + 1}"

    def error(self, location: Location, message: str, *, key: bool = False) -> RuleSetError:
        """Returns the one-line error to raise for this part."""
        return RuleSetError(f"{self.where(location, key=key)}: {message}")


class _Loader(yaml.SafeLoader):
    """The safe loader, for which 1e-3 is a number: YAML 1.1 takes it for text where it has no point."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml may be missing
    """The same in C where it is there, some ten times as fast; its errors are worded less well."""


for _each in (_Loader, _FastLoader):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )

MOST_BYTES = 8 << 20
"""Of a rule set: far more than a plan with an entry for each weight of the largest models."""

_LONG = 1 << 16


def parse_yaml(text: str, label: str, folder: Path | None = None) -> Source:
    """Parses one YAML document with the safe loader; anchors and merge keys are fine.

    Raises:
        RuleSetError: not YAML, a duplicate key, an unknown tag or an alias inside its own anchor.
    """
    if len(text) > MOST_BYTES:
        raise RuleSetError(f"{label}: {len(text):,} characters are no rule set; select weights by patterns")
    if len(text) > _LONG:
        with contextlib.suppress(yaml.YAMLError):
            return _parsed(_FastLoader(text), label, folder)
    try:
        return _parsed(_Loader(text), label, folder)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        hint = " (quote a pattern that begins with '*')" if "alias" in f"{error.context} {error.problem}" else ""
        raise RuleSetError(f"{place}: not valid YAML: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise RuleSetError(f"{label}: not valid YAML: {error}") from error


def _parsed(loader: Any, label: str, folder: Path | None) -> Source:
    try:
        root = loader.get_single_node()
        if root is None:
            raise RuleSetError(f"{label}:1:1: the rule set is empty")
        _reject_duplicates(root, label, (), set())
        return Source(label, loader.construct_document(root), folder, root)
    except RecursionError as error:
        raise RuleSetError(f"{label}: not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, RuleSetError):
        raise
    except Exception as error:  # a tag whose value is not of its kind: !!bool maybe, !!int x, 2026-13-01
        kind = f"{type(error).__name__}: {error}"
        raise RuleSetError(f"{label}: not valid YAML: a value is not of the kind that it says ({kind})") from error
    finally:
        loader.dispose()


def _reject_duplicates(node: yaml.Node, label: str, parents: tuple[yaml.Node, ...], done: set[int]) -> None:
    if any(node is parent for parent in parents):
        mark = node.start_mark
        raise RuleSetError(f"{label}:{mark.line + 1}:{mark.column + 1}: an alias inside its own anchor")
    if id(node) in done or isinstance(node, yaml.ScalarNode):
        return
    done.add(id(node))
    children = node.value
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, _ in node.value:
            mark = name.start_mark
            if isinstance(name, yaml.ScalarNode) and name.value in lines:
                place = f"{label}:{mark.line + 1}:{mark.column + 1}"
                raise RuleSetError(f"{place}: duplicate key '{name.value}' (first on line {lines[name.value]})")
            lines[str(name.value)] = mark.line + 1
        children = [child for _, child in node.value]
    for child in children:
        _reject_duplicates(child, label, (*parents, node), done)


def _step(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    if isinstance(node, yaml.MappingNode):
        # Merged keys stand before a mapping's own, which win.
        return next(((name, child) for name, child in reversed(node.value) if name.value == str(part)), None)
    return None


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
