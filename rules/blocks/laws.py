"""Laws: what an elementwise operator makes of two contents, of a content and a constant, or of a content and anything.

Each law is a function of a few lines in an open table, beside the contents that it is about; another package may add to
the tables. A law returns None where it is not about these contents, and every operator asks all of its laws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.rules.blocks.axes import Content, Located
from rewriter.tensors import View

OfTwo = Callable[[Located, Located, ir.Node], Content | None]
"""Content of ``a op b``, whose indices lie where those of a and b do together."""
OfNumber = Callable[[Located, float, ir.Node], Content | None]
"""Content of ``a op number``."""
OfConstant = Callable[[Located, View, ir.Node], Content | None]
"""Content of ``a op constant``; asked before the laws of numbers."""
OfAny = Callable[[Facts, ir.Value, Located | None, Located, ir.Node], Located | None]
"""``value op b`` of a value that may be anything, with what is known of it, and a content b."""

_L = TypeVar("_L", bound=Callable[..., object])


class Laws(Generic[_L]):
    """An open table of laws by operator."""

    def __init__(self) -> None:
        """Begins an empty table."""
        self._by_operator: dict[str, list[_L]] = {}

    def at(self, *op_types: str) -> Callable[[_L], _L]:
        """Puts the function below into the table, at each of these operators."""

        def register(law: _L) -> _L:
            for op_type in op_types:
                self._by_operator.setdefault(op_type, []).append(law)
            return law

        return register

    def of(self, op_type: str) -> Sequence[_L]:
        """Returns the laws of an operator."""
        return self._by_operator.get(op_type, ())


of_two: Laws[OfTwo] = Laws()
of_number: Laws[OfNumber] = Laws()
of_constant: Laws[OfConstant] = Laws()
of_any: Laws[OfAny] = Laws()
