"""Experts: their matrices, their halves and what is between them."""

from __future__ import annotations

from typing import Any

import numpy as np
from block_parts import Part


class Experts(Part):
    """Writes linears and activations."""

    def _array(self, name: str) -> Any:
        """[E, N, K], or [E, N] of a bias; gate and up together where they are."""
        if not name.startswith("both"):
            return self.arrays[name]
        gate, up = self.arrays[name.replace("both", "gate")], self.arrays[name.replace("both", "up")]
        if self.how.halves == "interleaved":
            return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
        return np.concatenate([gate, up], axis=1)

    def _stack(self, name: str, *, transposed: bool) -> str:
        array = self._array(name)
        stack = f"stack_{name}"
        if stack not in self.g.initializers:
            self.g.weight(stack, np.swapaxes(array, 1, 2).copy() if transposed else array)
        return stack

    def _matrix(self, name: str, expert: int) -> str:
        """[K, N] of one expert."""
        g, how = self.g, self.how
        if how.broken == "input-weight" and name == "down" and expert == 1:
            return "x"
        if how.weights.startswith("own"):
            transposed = how.weights == "own-transposed"
            array = self._array(name)[expert]
            stored = g.weight(f"{name}_{expert}", array if transposed else array.T.copy())
            return str(g.op("Transpose", stored, perm=[1, 0])) if transposed else stored
        if how.weights == "slice":
            part = g.op("Slice", self._stack(name, transposed=True), g.const([expert]), g.const([expert + 1]))
            return str(g.op("Squeeze", part, g.const([0])))
        if how.weights == "split":
            if f"split_{name}" not in self.__dict__:
                count = how.experts
                stack = self._stack(name, transposed=True)
                self.__dict__[f"split_{name}"] = g.op("Split", stack, outputs=count, axis=0, num_outputs=count)
            return str(g.op("Squeeze", self.__dict__[f"split_{name}"][expert], g.const([0])))
        if how.weights == "gather-transposed":
            return str(g.op("Gather", self._stack(name, transposed=True), g.const(expert), axis=0))
        part = g.op("Gather", self._stack(name, transposed=False), g.const([expert]), axis=0)
        return str(g.op("Transpose", g.op("Squeeze", part, g.const([0]))))

    def _vector(self, name: str, expert: int) -> str:
        return str(self.g.op("Gather", self.g.weight(f"all_{name}", self._array(name)), self.g.const(expert), axis=0))

    def _affine(self, x: str, name: str, expert: int) -> str:
        g = self.g
        if self.how.weights == "gather-rank1" and self.how.rank == 2:
            bias = [self._vector(f"{name}_bias", expert)] if self.how.bias else []
            matrix = g.op("Gather", self._stack(name, transposed=False), g.const(expert), axis=0)
            return str(g.op("Gemm", x, matrix, *bias, transB=1))
        product = g.op("MatMul", x, self._matrix(name, expert))
        return str(g.op("Add", product, self._vector(f"{name}_bias", expert)) if self.how.bias else product)

    def _gate_up(self, x: str, expert: int) -> tuple[str, str]:
        g, how = self.g, self.how
        if not self.gated or how.halves == "apart":
            gate = self._affine(x, "gate", expert)
            return gate, self._affine(x, "up", expert) if self.gated else ""
        both = g.op("MatMul", x, self._matrix("both", expert))
        if how.bias:
            both = g.op("Add", both, self._vector("both_bias", expert))
        if how.halves == "split":
            return tuple(g.op("Split", both, outputs=2, axis=-1, num_outputs=2))  # type: ignore[return-value]
        i = how.inter
        bounds = ((0, 2**62, 2), (1, 2**62, 2)) if how.halves == "interleaved" else ((0, i, 1), (i, 2 * i, 1))
        parts = [
            g.op("Slice", both, g.const([start]), g.const([end]), g.const([-1]), g.const([step]))
            for start, end, step in bounds
        ]
        return parts[0], parts[1]

    def _activated(self, gate: str, up: str, *, odd: bool = False) -> str:
        g, how = self.g, self.how
        kind = how.activation
        if how.broken == "other-activation" and odd:
            kind = "clamped" if kind == "swiglu" else "swiglu"
        if how.broken == "swapped" and odd:
            gate, up = up, gate
        if how.broken == "erf-gelu":
            return str(g.op("Mul", g.op("Gelu", gate), up))
        if kind.startswith("gelu-"):
            return self._gelu(gate, kind)
        if kind.startswith("geglu"):
            gelu = self._gelu(gate, kind) if kind == "geglu-tanh" else g.op("Gelu", gate, approximate="tanh")
            return str(g.op("Mul", *((up, gelu) if kind == "geglu-up-first" else (gelu, up))))
        if kind in ("squared", "pow"):
            relu = g.op("Relu", gate)
            return str(g.op("Mul", relu, relu) if kind == "squared" else g.op("Pow", relu, g.number(2.0)))
        if how.broken == "tanh":
            return str(g.op("Mul", g.op("Tanh", gate), up))
        if kind == "reglu":
            return str(g.op("Mul", g.op("Relu", gate), up))
        if kind == "swiglu":
            return str(g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up))
        if kind.startswith("written-out"):
            below = g.op("Add", g.op("Exp", g.op("Neg", gate)), g.number(1.0))
            if kind == "written-out-quotient":
                return str(g.op("Mul", up, g.op("Div", gate, below)))
            one = kind != "written-out-reciprocal"
            sigmoid = g.op("Div", g.number(1.0), below) if one else g.op("Reciprocal", below)
            return str(g.op("Mul", up, g.op("Mul", gate, sigmoid)))
        if kind == "gate-times-up-first":
            return str(g.op("Mul", g.op("Sigmoid", gate), g.op("Mul", up, gate)))
        if kind.startswith("clamped"):
            return self._clamped(gate, up, as_clip=kind == "clamped")
        if kind == "silu":
            return str(g.op("Mul", gate, g.op("Sigmoid", gate)))
        if kind == "quick":
            return str(g.op("QuickGelu", gate, domain="com.microsoft", alpha=1.0))
        if kind == "gelu":
            return str(g.op("Gelu", gate, approximate="tanh"))
        return gate if kind == "plain" else str(g.op("Relu", gate))

    def _gelu(self, x: str, kind: str) -> str:
        """The tanh form in plain operators, as torch.onnx and transformers write it."""
        g, cubic = self.g, 0.05 if self.how.broken == "other-cubic" else 0.044715
        pow_first = kind == "gelu-pow"
        cube = g.op("Pow", x, g.number(3.0)) if pow_first else g.op("Mul", x, g.op("Mul", x, x))
        inner = g.op("Mul", g.number(np.sqrt(2 / np.pi)), g.op("Add", x, g.op("Mul", g.number(cubic), cube)))
        outer = g.op("Add", g.op("Tanh", inner), g.number(1.0))
        if pow_first:
            return str(g.op("Mul", g.number(0.5), g.op("Mul", x, outer)))
        return str(g.op("Mul", g.op("Mul", x, g.number(0.5)), outer))

    def _clamped(self, gate: str, up: str, *, as_clip: bool) -> str:
        g = self.g
        bound = -0.7 if self.how.broken == "negative-limit" else 0.7
        high, low = g.number(bound), g.number(-0.6 if self.how.broken == "uneven-limit" else -bound)
        if as_clip:
            gate, up = g.op("Clip", gate, "", high), g.op("Clip", up, low, high)
        else:
            gate, up = g.op("Min", gate, high), g.op("Max", g.op("Min", up, high), low)
        glu = g.op("Mul", gate, g.op("Sigmoid", g.op("Mul", gate, g.number(1.702))))
        return str(g.op("Mul", g.op("Add", up, g.number(1.0)), glu))
