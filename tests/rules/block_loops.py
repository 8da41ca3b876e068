"""Experts one at a time on the rows that chose them, ``where(mask[e])``, added back to where they come from."""

from __future__ import annotations

from block_unrolled import Unrolled

FAR = 2**63 - 1


class Loops(Unrolled):
    """Writes the loop that transformers had until 4.52, and many models of their own."""

    def loops(self, x: str, weights: str, chosen: str) -> str:
        """``loop``: as dynamo writes it; ``loop-flat``: as TorchScript does; ``loop-tokens-first``: the mask turned."""
        g, how = self.g, self.how
        mask = g.op("OneHot", chosen, g.const(how.experts), g.const([0, 1]), axis=-1)
        self.slot_first = how.combine != "loop-tokens-first"
        mask = g.op("Transpose", mask, perm=[2, 1, 0] if self.slot_first else [2, 0, 1])
        experts = [e for e in range(how.experts) if how.broken != "missing" or e != 1]
        total = x if how.broken == "other-seed" else g.op("Expand", g.number(0.0), g.op("Shape", x))
        for expert in experts:
            total = self._looped(x, weights, mask, total, expert)
            if how.broken == "doubled" and expert == 1:
                total = self._looped(x, weights, mask, total, expert)
        return total

    def _looped(self, x: str, weights: str, mask: str, total: str, expert: int) -> str:
        g, how = self.g, self.how
        slot, token = self._hits(mask, expert)
        other = self._hits(mask, 0) if expert == 2 and how.broken in ("other-share", "other-rows") else (slot, token)
        flat = how.combine == "loop-flat"
        rows = g.op("Gather", x, token, axis=0) if flat else g.op("GatherND", x, self._column(token))
        output = self._expert(rows, expert, expert)
        share = self._share(weights, *(other if how.broken == "other-share" else (slot, token)), flat=flat)
        term = g.op("Mul", output, share)
        back = other[1] if how.broken == "other-rows" else token
        replaces = how.broken == "replaced" and expert == 2
        if not flat:
            reduction = {} if replaces else {"reduction": "add"}
            return str(g.op("ScatterND", total, self._column(back), term, **reduction))
        first = g.op("Slice", total, g.const([0, 0]), g.const([1, FAR]), g.const([0, 1]))
        term = g.op("Expand", term, g.op("Shape", first))
        index = g.op("Expand", self._column(back), g.op("Shape", term))
        zeros = total if replaces else g.op("ConstantOfShape", g.op("Shape", total))
        written = g.op("ScatterElements", zeros, index, term, axis=0)
        return written if replaces else str(g.op("Add", total, written))

    def _hits(self, mask: str, expert: int) -> tuple[str, str]:
        """Which slots and which tokens hold an expert, [hits] each."""
        g = self.g
        both = g.op("NonZero", g.op("Gather", mask, g.const(expert), axis=0))
        first, second = g.op("Split", g.op("Transpose", both, perm=[1, 0]), g.const([1, 1]), outputs=2, axis=1)
        first, second = (g.op("Squeeze", index, g.const([1])) for index in (first, second))
        return (first, second) if self.slot_first else (second, first)

    def _share(self, weights: str, slot: str, token: str, *, flat: bool) -> str:
        g = self.g
        wide = g.op("Unsqueeze", weights, g.const([2]))
        if not flat:
            return str(g.op("GatherND", wide, g.op("Concat", self._column(token), self._column(slot), axis=-1)))
        pair = g.op("Add", slot, g.op("Mul", token, g.op("Gather", g.op("Shape", wide), g.const([1]))))
        return str(g.op("Gather", g.op("Flatten", wide, axis=2), pair, axis=0))

    def _column(self, index: str) -> str:
        return str(self.g.op("Unsqueeze", index, self.g.const([1])))
