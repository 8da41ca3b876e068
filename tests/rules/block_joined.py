"""Experts one at a time, their outputs side by side, weighed and summed at once."""

from __future__ import annotations

from block_unrolled import Unrolled


class Joined(Unrolled):
    """Writes the sum over [.., E, H], as behind torch.stack."""

    def joined(self, x: str, weights: str, chosen: str) -> str:
        g, how = self.g, self.how
        outputs = [self._expert(x, expert, expert) for expert in range(how.experts)]
        axis = -1 if how.combine == "joined-last" else -2
        together = g.op("Concat", *(g.op("Unsqueeze", y, g.const([axis])) for y in outputs), axis=axis)
        if how.combine == "joined-gathered":
            return self._gathered(together, weights, chosen)
        share = self._scattered(weights, chosen)
        if how.broken == "features":  # summed over as many features as there are experts
            together = g.op("Transpose", together, perm=[0, 2, 1])
        if how.combine == "joined-einsum":
            lead = "t" if how.rank == 2 else "bs"
            return str(g.op("Einsum", share, together, equation=f"{lead}e,{lead}eh->{lead}h"))
        if how.combine == "joined-last":
            column = g.op("MatMul", together, g.op("Unsqueeze", share, g.const([-1])))
            return str(g.op("Squeeze", column, g.const([-1])))
        if how.combine == "joined-matmul":
            row = g.op("MatMul", g.op("Unsqueeze", share, g.const([-2])), together)
            return str(g.op("Squeeze", row, g.const([-2])))
        mixed = g.op("Mul", together, g.op("Unsqueeze", share, g.const([-1])))
        return str(g.op("ReduceSum", mixed, g.const([-2]), keepdims=0))

    def _gathered(self, together: str, weights: str, chosen: str) -> str:
        """Only the outputs [.., k, H] of the chosen experts are weighed."""
        g, how = self.g, self.how
        wide = g.op("Unsqueeze", chosen, g.const([-1]))
        shape = g.op("Concat", g.op("Shape", chosen), g.const([how.hidden]), axis=0)
        picked = g.op("GatherElements", together, g.op("Expand", wide, shape), axis=-2)
        mixed = g.op("Mul", picked, g.op("Unsqueeze", weights, g.const([-1])))
        return str(g.op("ReduceSum", mixed, g.const([-2]), keepdims=0))
