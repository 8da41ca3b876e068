"""Experts one at a time, each weighed and added."""

from __future__ import annotations

import numpy as np
from block_experts import Experts
from block_parts import ELEMENT
from onnx import numpy_helper


class Unrolled(Experts):
    """Writes every expert on its own, and what it counts for."""

    def unrolled(self, x: str, weights: str, chosen: str) -> str:
        g, how = self.g, self.how
        experts = list(range(how.experts))
        if how.broken == "missing":
            experts.remove(1)
        if how.broken == "doubled":
            experts.append(1)
        total = self._seed(x)
        everyone = self._columns(weights, chosen)
        for position, expert in enumerate(experts):
            output = self._expert(x, expert, position)
            for share in self._shares(weights, chosen, everyone, expert, position):
                pair = (output, share) if position % 2 else (share, output)
                term = g.op("Mul", *pair)
                total = term if not total else g.op("Add", *((total, term) if position % 3 else (term, total)))
        return total

    def _seed(self, x: str) -> str:
        g, how = self.g, self.how
        if how.seed == "expand":
            return str(g.op("Expand", g.number(0.0), g.op("Shape", x)))
        if how.seed == "constant-of-shape":
            zero = numpy_helper.from_array(np.zeros(1, g.dtype))
            return str(g.op("ConstantOfShape", g.op("Shape", x), value=zero))
        if how.broken == "other-seed":
            return x
        if how.broken == "wide-seed":
            shape = g.op("Concat", g.const([3]), g.op("Shape", x), axis=0)
            return str(g.op("Expand", g.number(0.0), shape))
        return ""

    def _expert(self, x: str, expert: int, position: int) -> str:
        g, how = self.g, self.how
        own = expert
        if how.broken == "other-weight" and position == 2:
            own = 0
        if how.broken == "other-input" and position == 2:
            x = g.op("Add", x, x)
        gate, up = self._gate_up(x, own)
        features = self._activated(gate, up, odd=position == 2)
        if position == 1:
            self.inner = features
        output = g.op("MatMul", features, self._matrix("down", own))
        return str(g.op("Add", output, self._vector("down_bias", own)) if how.bias else output)

    def _columns(self, weights: str, chosen: str) -> str:
        """[.., E], for the spellings that make it once."""
        g, how = self.g, self.how
        if how.combine in ("onehot", "equal-range"):
            wide = g.op("Unsqueeze", weights, g.const([-1]))
            if how.combine == "onehot":
                mask = g.op("OneHot", chosen, g.const(how.experts), g.const([0, 1], g.dtype), axis=-1)
            else:
                mask = g.op("Equal", g.op("Unsqueeze", chosen, g.const([-1])), g.const(range(how.experts)))
                mask = g.op("Cast", mask, to=ELEMENT[g.dtype])
            return str(g.op("ReduceSum", g.op("Mul", mask, wide), g.const([-2]), keepdims=0))
        if how.combine in ("scatter", "scatter-softmax"):
            return self._scattered(weights, chosen)
        return ""

    def _shares(self, weights: str, chosen: str, everyone: str, expert: int, position: int) -> list[str]:
        g, how = self.g, self.how
        shown = 0 if how.broken == "other-share" and position == 2 else expert
        if everyone:
            return [g.op("Gather", everyone, g.const([shown]), axis=-1)]
        if how.combine in ("slots", "terms-per-slot"):
            slots = [self._slot(weights, chosen, shown, slot) for slot in range(how.k)]
            if how.broken == "missing-slot" and position == 1:
                slots.pop()
            if how.combine == "terms-per-slot":
                return slots
            total = slots[0]
            for slot in slots[1:]:
                total = g.op("Add", total, slot)
            return [total]
        mask = g.op("Equal", chosen, g.const(shown))
        if how.combine == "where":
            picked = g.op("Where", mask, weights, g.number(0.0))
        else:
            number = g.op("Cast", mask, to=ELEMENT[g.dtype])
            picked = g.op("Mul", *((number, weights) if how.combine == "mask-first" else (weights, number)))
        axis = 0 if how.broken == "sum-axis" and position == 1 else -1
        return [g.op("ReduceSum", picked, g.const([axis]), keepdims=1)]

    def _slot(self, weights: str, chosen: str, expert: int, slot: int) -> str:
        g = self.g
        other = (slot + 1) % self.how.k if self.how.broken == "crossed-slots" else slot
        bounds = [(g.const([s]), g.const([s + 1]), g.const([-1])) for s in (slot, other)]
        mask = g.op("Equal", g.op("Slice", chosen, *bounds[0]), g.const(expert))
        return str(g.op("Mul", g.op("Cast", mask, to=ELEMENT[g.dtype]), g.op("Slice", weights, *bounds[1])))
