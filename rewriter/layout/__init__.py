"""Deprecated: functions of stored layouts under their old names, for rule packages; removed in the next release.

Layouts are objects now: ``rewriter.operators.matmul_nbits.RAW.of(shape)`` and the like.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import Any

from rewriter.operators import gather_block_quantized as _gather
from rewriter.operators import matmul_nbits as _matmul
from rewriter.operators import qmoe as _qmoe
from rewriter.operators.layout import cutlass, packing
from rewriter.operators.layout.stored import Layout, Refusal
from rewriter.quantize.types import QuantizedShape, QuantizedWeight


@dataclass(frozen=True)
class _Functions:
    """The functions that a module had, of layouts that options choose among."""

    choose: Callable[..., Layout]
    arrays: type

    def illegal(self, *sizes: int, **options: Any) -> str | None:
        """Returns why there is no such weight, or None."""
        n, k, bits, block = sizes if len(sizes) == 4 else (1, *sizes)
        stored = self.choose(**options).of(QuantizedShape(n, k, bits, block))
        return stored.reason if isinstance(stored, Refusal) else None

    def pack(self, weight: QuantizedWeight, **options: Any) -> Any:
        """Returns the operator's arrays."""
        return self.arrays(*(*self.choose(**options).require(weight.shape).pack(weight), None)[:3])

    def unpack(self, arrays: Any, n: int, k: int, bits: int, block: int, **options: Any) -> QuantizedWeight:
        """Inverse of ``pack``."""
        found = [array for array in vars(arrays).values() if array is not None]
        return self.choose(**options).require(QuantizedShape(n, k, bits, block, len(found) < 3)).unpack(found)

    def module(self, name: str) -> types.ModuleType:
        """Returns the module of before."""
        module = types.ModuleType(f"{__name__}.{name}")
        vars(module).update({name: getattr(self, name) for name in ("illegal", "pack", "unpack")})
        setattr(module, self.arrays.__name__, self.arrays)
        return module


def _prepacked(layouts: tuple[Layout, ...]) -> Callable[..., Layout]:
    return lambda prepacked=None: layouts[(None, *cutlass.ARCHITECTURES).index(prepacked)]


def _tied(*, tied: bool = False) -> Layout:
    return _gather.TIED if tied else _gather.TABLE


def _arrays(name: str, codes: str) -> type:
    return make_dataclass(name, [codes, "scales", "zero_points"], frozen=True)


matmul_nbits = _Functions(_prepacked(_matmul.LAYOUTS), _arrays("MatMulNBitsArrays", "b")).module("matmul_nbits")
qmoe = _Functions(_prepacked(_qmoe.LAYOUTS), _arrays("QMoEArrays", "weight")).module("qmoe")
gather_block_quantized = _Functions(_tied, _arrays("GatherArrays", "data")).module("gather_block_quantized")

warnings.warn("rewriter.layout is rewriter.operators now, and layouts are objects", DeprecationWarning, stacklevel=2)
for _module in (cutlass, gather_block_quantized, matmul_nbits, packing, qmoe):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
