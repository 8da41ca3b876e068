"""All experts, or the chosen ones, at once."""

from __future__ import annotations

from block_experts import Experts


class Stacked(Experts):
    """Writes batched products of stacks."""

    def stacked(self, x: str, weights: str, chosen: str) -> str:
        if self.how.combine.startswith("dense"):
            return self._dense(x, weights, chosen)
        return (self._slots if self.how.combine == "slot-loop" else self._chosen)(x, weights, chosen)

    def _slots(self, x: str, weights: str, chosen: str) -> str:
        """One slot after the other, its expert's weights gathered; x is [T, H]."""
        g, how = self.g, self.how
        total = g.op("Expand", g.number(0.0), g.op("Shape", x))
        slots = [1, *range(1, how.k)] if how.broken == "doubled" else list(range(how.k))
        for slot in slots[: 1 if how.broken == "missing-slot" else None]:
            ids = g.op("Gather", chosen, g.const(slot), axis=1)
            output = self._of_slot(x, ids)
            other = 1 - slot if how.broken == "crossed-slots" else slot
            share = g.op("Slice", weights, g.const([other]), g.const([other + 1]), g.const([1]))
            total = g.op("Add", total, g.op("Mul", share, output))
        return str(total)

    def _of_slot(self, x: str, ids: str) -> str:
        g, how = self.g, self.how

        def linear(data: str, name: str) -> str:
            matrix = g.op("Gather", self._stack(name, transposed=False), ids, axis=0)
            out = g.op("Squeeze", g.op("MatMul", matrix, g.op("Unsqueeze", data, g.const([-1]))), g.const([-1]))
            bias = g.weight(f"{name}_b", self._array(f"{name}_bias")) if how.bias else ""
            return str(g.op("Add", out, g.op("Gather", bias, ids, axis=0)) if bias else out)

        gate, up = self._parts([linear(x, name) for name in self._both()], -1)
        return linear(self._activated(gate, up), "down")

    def _both(self) -> list[str]:
        return ["both"] if self.gated and self.how.halves != "apart" else ["gate", "up"] if self.gated else ["gate"]

    def _parts(self, found: list[str], axis: int) -> tuple[str, str]:
        g, i = self.g, self.how.inter
        if len(found) == 2 or not self.gated:
            return found[0], found[-1]
        if self.how.halves == "split":
            return tuple(g.op("Split", found[0], outputs=2, axis=axis, num_outputs=2))  # type: ignore[return-value]
        inter = self.how.halves == "interleaved"
        bounds = ((0, 2**62, 2), (1, 2**62, 2)) if inter else ((0, i, 1), (i, 2 * i, 1))
        first, second = (
            g.op("Slice", found[0], g.const([a]), g.const([b]), g.const([axis]), g.const([s])) for a, b, s in bounds
        )
        return first, second

    def _dense(self, x: str, weights: str, chosen: str) -> str:
        """[E, T, ..]; x is [T, H]."""
        g, how = self.g, self.how
        rows = g.op("Unsqueeze", x, g.const([0]))
        if how.combine == "dense-expand":
            rows = g.op("Expand", rows, g.const([how.experts, 1, 1]))

        def linear(data: str, name: str) -> str:
            out = g.op("MatMul", data, self._stack(name, transposed=True))
            bias = f"{name}_bias"
            return str(g.op("Add", out, g.weight(bias, self._array(bias)[:, None])) if how.bias else out)

        gate, up = self._parts([linear(rows, name) for name in self._both()], -1)
        output = linear(self._activated(gate, up), "down")
        share = g.op("Transpose", self._scattered(weights, chosen), perm=[1, 0])
        mixed = g.op("Mul", output, g.op("Unsqueeze", share, g.const([-1])))
        return str(g.op("ReduceSum", mixed, g.const([0]), keepdims=0))

    def _chosen(self, x: str, weights: str, chosen: str) -> str:
        """[T * k, ..], or [T, k, ..] with Einsum; x is [T, H]."""
        g, how = self.g, self.how
        if how.broken == "other-choice":
            _, chosen = g.op("TopK", g.op("Neg", x), g.const([how.k]), outputs=2, axis=-1)
            chosen = g.op("Mod", chosen, g.const(how.experts))
        if how.combine.startswith("chosen-einsum"):
            return self._with_einsum(x, weights, chosen)
        ids = g.op("Unsqueeze", g.op("Reshape", chosen, g.const([-1])), g.const([-1]))
        rows = g.op("Expand", g.op("Unsqueeze", x, g.const([1])), g.const([1, how.k, 1]))
        rows = g.op("Reshape", rows, g.const([-1, how.hidden]))
        left = how.combine == "chosen-left"

        def linear(data: str, name: str) -> str:
            matrix = g.op("GatherND", self._stack(name, transposed=not left), ids)
            axis = -1 if left else 1
            data = g.op("Unsqueeze", data, g.const([axis]))
            out = g.op("MatMul", *((matrix, data) if left else (data, matrix)))
            out = g.op("Squeeze", out, g.const([axis]))
            if not how.bias:
                return str(out)
            return str(g.op("Add", out, g.op("GatherND", g.weight(f"{name}_b", self._array(f"{name}_bias")), ids)))

        gate, up = self._parts([linear(rows, name) for name in self._both()], -1)
        output = linear(self._activated(gate, up), "down")
        share = g.op("Unsqueeze", g.op("Reshape", weights, g.const([-1])), g.const([-1]))
        mixed = g.op("Reshape", g.op("Mul", output, share), g.const([-1, how.k, how.hidden]))
        return str(g.op("ReduceSum", mixed, g.const([1]), keepdims=0))

    def _with_einsum(self, x: str, weights: str, chosen: str) -> str:
        g, how = self.g, self.how

        def linear(data: str, name: str, equation: str) -> str:
            matrix = g.op("Gather", self._stack(name, transposed=False), chosen, axis=0)
            out = g.op("Einsum", data, matrix, equation=equation)
            if not how.bias:
                return str(out)
            bias = g.weight(f"{name}_b", self._array(f"{name}_bias"))
            return str(g.op("Add", out, g.op("Gather", bias, chosen, axis=0)))

        gate, up = self._parts([linear(x, name, "th,tkoh->tko") for name in self._both()], -1)
        output = linear(self._activated(gate, up), "down", "tko,tkho->tkh")
        if how.combine == "chosen-einsum-sum":
            equation = "tkh,tk->kh" if how.broken == "sum-axis" else "tkh,tk->th"
            return str(g.op("Einsum", output, weights, equation=equation))
        mixed = g.op("Mul", output, g.op("Unsqueeze", weights, g.const([-1])))
        return str(g.op("ReduceSum", mixed, g.const([1]), keepdims=0))
