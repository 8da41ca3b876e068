"""Routers: from logits to the weights and indices of the chosen experts."""

from __future__ import annotations

import numpy as np
from block_parts import ELEMENT, GIVEN, Part


class Routing(Part):
    """Writes the router of a block."""

    def route(self, logits: str) -> tuple[str, str]:
        g, how = self.g, self.how
        k = g.const([how.k])
        if how.router == "float32":
            values, chosen = g.op("TopK", g.op("Sqrt", g.op("Exp", g.op("Cast", logits, to=1))), k, outputs=2, axis=-1)
            return g.op("Cast", g.op("Softmax", values, axis=-1), to=ELEMENT[g.dtype]), chosen
        if how.router in GIVEN:
            return self._given(logits, k)
        before = {"topk-softmax": "", "sigmoid-normalised": "Sigmoid", "sigmoid-late": "", "raw": ""}.get(
            how.router, "Softmax"
        )
        axis = 0 if how.broken == "softmax-axis" else -1
        scores = logits
        if before:
            scores = g.op(before, logits, **({"axis": axis} if before == "Softmax" else {}))
        largest = 0 if how.broken == "smallest" else 1
        values, chosen = g.op("TopK", scores, k, outputs=2, axis=-1, largest=largest)
        if how.broken == "other-topk":
            values, _ = g.op("TopK", g.op("Softmax", g.op("Neg", logits), axis=-1), k, outputs=2, axis=-1)
        if how.router == "sigmoid-late":
            values = g.op("Sigmoid", values)
        if how.router == "topk-softmax":
            values = g.op("Softmax", values, axis=-1)
        elif how.router in ("softmax-topk", "raw"):
            pass
        else:
            total = g.op("ReduceSum", values, g.const([-1]), keepdims=1)
            if how.router == "epsilon":
                total = g.op("Add", total, g.number(1e-20))
            if how.broken == "large-epsilon":
                total = g.op("Add", total, g.number(0.1))
            values = g.op("Div", values, total)
        if how.router == "scaled":
            values = g.op("Mul", values, g.number(2.5))
        if how.router == "table":
            table = g.const(np.linspace(0.5, 1.5, how.experts), self.g.dtype)
            values = g.op("Mul", values, g.op("Gather", table, chosen, axis=0))
        if how.broken == "raw-logits":
            values, chosen = g.op("TopK", logits, k, outputs=2, axis=-1)
        return values, chosen

    def _given(self, logits: str, k: str) -> tuple[str, str]:
        """Weights that are no function of what selects."""
        g, how = self.g, self.how
        if how.router == "masked":
            scores = g.op("Softmax", logits, axis=-1)
            masked = g.op("Where", g.op("Less", scores, g.number(0.05)), g.number(0.0), scores)
            return tuple(g.op("TopK", masked, k, outputs=2, axis=-1))  # type: ignore[return-value]
        if how.router == "late":
            values, chosen = g.op("TopK", logits, k, outputs=2, axis=-1)
            return g.op("Sigmoid", values), chosen
        if how.router == "exponential":
            values, chosen = g.op("TopK", g.op("Exp", logits), k, outputs=2, axis=-1)
            return g.op("Div", values, g.op("ReduceSum", values, g.const([-1]), keepdims=1)), chosen
        if how.router.startswith("softplus"):
            scores = g.op("Softplus", logits)
            if how.router == "softplus-large":
                large = g.op("Greater", logits, g.number(-1.0 if how.broken == "low-threshold" else 20.0))
                scores = g.op("Where", large, logits, scores)
            values, chosen = g.op("TopK", g.op("Sqrt", scores), k, outputs=2, axis=-1)
            return g.op("Div", values, g.op("ReduceSum", values, g.const([-1]), keepdims=1)), chosen
        scores = g.op("Sigmoid", logits) if how.broken != "negative" else g.op("Tanh", logits)
        shift = g.const(np.linspace(-0.3, 0.3, how.experts), g.dtype)
        _, chosen = g.op("TopK", g.op("Add", scores, shift), k, outputs=2, axis=-1)
        values = g.op("GatherElements", scores, chosen, axis=-1)
        if how.router == "biased-table":
            table = g.const(np.linspace(0.5, 1.5, how.experts), self.g.dtype)
            values = g.op("Mul", values, g.op("Gather", table, chosen, axis=0))
        elif how.router != "biased-raw":
            total = g.op("ReduceSum", values, g.const([-1]), keepdims=1)
            if how.router == "biased-epsilon":
                total = g.op("Add", total, g.number(0.25 if how.broken != "negative-epsilon" else -0.25))
            if how.router == "biased-clipped":
                total = g.op("Clip", total, g.number(1.5))
            values = g.op("Div", values, total)
        return g.op("Mul", values, g.number(2.5)), chosen
