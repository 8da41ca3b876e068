"""Imports that other packages make at once and a run rarely needs, put off until something of them is used."""

from __future__ import annotations

import importlib.abc
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder

_NAMES = frozenset({"sympy", "onnx_ir._symbolic_shapes", "onnx.reference", "onnx.reference.ops"})
"""Arithmetic with names of dimensions, and ONNX's own evaluator: a fifth of what all imports take."""


class _Postponed(types.ModuleType):
    """A module that is executed when it is first asked for something."""

    def __getattr__(self, name: str) -> object:
        assert self.__spec__ is not None
        self.__class__ = types.ModuleType  # type: ignore[assignment]  # what it imports may ask it for more
        self.__spec__.loader_state.exec_module(self)
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _NAMES else None
        if spec is not None:
            spec.loader_state, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing yet."""
        module.__class__ = _Postponed


def postpone() -> None:
    """Puts these imports off from now on, in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
