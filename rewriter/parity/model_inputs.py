"""Random inputs for language models and their parts, from nothing but the graph."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import UsageError
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.text import nbytes

Array = npt.NDArray[np.generic]

_CACHE = re.compile(r"past|cache(?!_position)|state", re.IGNORECASE)
_SEES_THROUGH = {"Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Transpose", "Clip", "Where", "Max"}
_DEPTH = 8
_LARGEST = 1 << 30
"""Bytes of one input that are drawn: a model may declare any size."""


@dataclass(frozen=True)
class _Sizes:
    batch: int
    sequence: int
    past: int

    @property
    def total(self) -> int:
        return self.past + self.sequence


def random_inputs(
    model: ir.Model, seed: int = 0, *, batch: int = 1, sequence: int = 16, past: int = 0
) -> dict[str, Array]:
    """Returns seeded feeds for a model; the same model, seed and sizes give the same arrays.

    Token ids are rows of the embedding table that they index, masks are ones over past and present, positions count on
    from the past, caches are N(0, 1) (and empty where there is no past), all other floats are N(0, 1), all other
    integers 0. A symbolic dimension has one size in all inputs, read from its name (batch, past, total, a sum, a
    product), else from its place.

    Args:
        model: what is to be fed. Inputs with a default (an initializer of the same name) are left out.
        seed: of the random numbers.
        batch: examples.
        sequence: new tokens of each; enough to reach most experts, since a traced model may hold no fewer.
        past: tokens already in the caches; 0 where the model has no cache.

    Raises:
        UsageError: an input is no tensor, or has no known rank.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    cached = any(_is_cache(value) for value in inputs)
    sizes = _Sizes(batch, sequence, past if cached else 0)
    rng = np.random.default_rng(seed)
    bound: dict[str, int] = {}
    return {value.name or "": _fill(value, _shape(value, sizes, bound), sizes, rng) for value in inputs}


def token_feeds(model: ir.Model, tokens: Array) -> dict[str, Array]:
    """Returns feeds for a model that reads tokens: those, and all else as a first run over them has it.

    Args:
        model: what is to be fed.
        tokens: [B, S] token ids.

    Raises:
        UsageError: the model has no input of token ids, or not of this shape, or an id is beyond its table.
    """
    value = require_tokens(model, tokens)
    feeds = random_inputs(model, batch=len(tokens), sequence=tokens.shape[1])
    name = value.name or ""
    if feeds[name].size != tokens.size:
        shape, given = list(feeds[name].shape), list(tokens.shape)
        raise UsageError(f"input '{name}' takes {shape}, which {given} tokens do not fit; cut them so that they do")
    return feeds | {name: tokens.astype(feeds[name].dtype).reshape(feeds[name].shape)}


def require_tokens(model: ir.Model, tokens: Array) -> ir.Value:
    """Returns the input of token ids.

    Raises:
        UsageError: there is none, or an id is beyond its table.
    """
    found = token_input(model)
    if found is None:
        raise UsageError("the model has no input of token ids; give feeds of your own, an .npz file for each run")
    value, rows = found
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= rows:
        worst = least if least < 0 else most
        raise UsageError(f"token {worst} is none of the model's {rows:,}; the tokens are of another tokenizer")
    return value


def token_input(model: ir.Model) -> tuple[ir.Value, int] | None:
    """Returns the input of token ids, and how many tokens there are; None where there is no such input.

    It is the one that indexes the largest constant table, but for positions.
    """
    found = [
        (rows, value)
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
        and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        and "position" not in (value.name or "").lower()
        and (rows := _rows_indexed_by(value)) is not None
    ]
    if not found:
        return None
    rows, value = max(found, key=lambda entry: entry[0])
    return value, rows


def _fill(value: ir.Value, shape: tuple[int, ...], sizes: _Sizes, rng: np.random.Generator) -> Array:
    name = (value.name or "").lower()
    dtype = value.dtype
    if dtype is None or dtype == ir.DataType.STRING or not isinstance(value.type, ir.TensorType):
        raise UsageError(f"input '{value.name}' is not a tensor of numbers; give feeds of your own")
    kind = dtype.numpy()
    if (size := math.prod(shape) * dtype.itemsize) > _LARGEST:
        declared = f"input '{value.name}' is declared as {list(shape)}"
        raise UsageError(f"{declared}: {nbytes(size)} are not drawn at random; give feeds of your own")
    if dtype.is_floating_point():
        if "mask" in name:
            return (np.zeros if len(shape) > 2 else np.ones)(shape, kind)
        return rng.standard_normal(shape).astype(kind)
    if "mask" in name:
        return np.ones(shape, kind)
    if dtype == ir.DataType.BOOL:
        return np.full(shape, sizes.past > 0)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(sizes.past, sizes.past + shape[-1]), shape).astype(kind)
    if "seqlens_k" in name:
        return np.full(shape, sizes.total - 1, kind)
    if "total_seq" in name or "total_sequence" in name:
        return np.full(shape, sizes.total, kind)
    rows = _rows_indexed_by(value)
    return rng.integers(0, rows, shape).astype(kind) if rows else np.zeros(shape, kind)


def _shape(value: ir.Value, sizes: _Sizes, bound: dict[str, int]) -> tuple[int, ...]:
    if value.shape is None:
        raise UsageError(f"input '{value.name}' has no known rank; give feeds of your own")
    result = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            result.append(dim)
            continue
        symbol = str(dim.value) if dim.value is not None else f"{value.name}[{axis}]"
        if symbol not in bound:
            bound[symbol] = _size(symbol, value, axis, sizes, bound)
        result.append(bound[symbol])
    return tuple(result)


def _size(symbol: str, value: ir.Value, axis: int, sizes: _Sizes, bound: dict[str, int]) -> int:
    """The size of a symbolic dimension: a sum of products of numbers and names."""
    total = 0
    for term in symbol.split("+"):
        product = 1
        for factor in re.split(r"\s*\*\s*", term.strip(" ()")):
            if factor.isdigit():
                product *= int(factor)
            else:
                product *= bound[factor] if factor in bound else _named_size(factor.lower(), value, axis, sizes)
        total += product
    return total


def _named_size(name: str, value: ir.Value, axis: int, sizes: _Sizes) -> int:
    if "batch" in name:
        return sizes.batch
    if "total" in name or ("past" in name and "and" in name):
        return sizes.total
    if "past" in name and "sliding" in name:
        return _window(value) or sizes.past
    if "past" in name or "cache_len" in name:
        return sizes.past
    if "seq" in name or name in ("s", "t", "length"):
        return sizes.sequence
    rank = len(value.shape or ())
    if _is_cache(value):
        # [batch, heads, past, head size], the layout of every exporter's key and value caches
        return {0: sizes.batch, rank - 1: _head_size(value) or 1, rank - 2: sizes.past}.get(axis, 1)
    if axis == 0 and rank > 1:
        return sizes.batch
    return sizes.total if "mask" in (value.name or "").lower() else sizes.sequence


def _is_cache(value: ir.Value) -> bool:
    rank = len(value.shape or ())
    floating = value.dtype is not None and value.dtype.is_floating_point()
    return rank > 2 and floating and _CACHE.search(value.name or "") is not None


def _users(value: ir.Value, depth: int = _DEPTH) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read ``value``, as it is or moved about, and at which input."""
    for node, index in value.uses():
        yield node, index
        if depth and node.op_type in _SEES_THROUGH:
            yield from _users(node.outputs[0], depth - 1)


def _rows_indexed_by(value: ir.Value) -> int | None:
    """Rows of the smallest constant table that ``value`` indexes."""
    tables = [
        rows
        for node, index in _users(value)
        if index == 1
        and node.op_type in ("Gather", GATHER_BLOCK_QUANTIZED.name)
        and node.inputs[0] is not None
        and (rows := _rows(node.inputs[0])) is not None
    ]
    return min(tables, default=None)


def _rows(table: ir.Value | None, depth: int = _DEPTH) -> int | None:
    """First dimension of a constant table, also of one that is a constant's bytes in another shape."""
    if table is None or not depth:
        return None
    if table.const_value is not None:
        return int(table.const_value.shape.numpy()[0]) if table.const_value.shape.rank() else None
    producer = table.producer()
    return _rows(producer.inputs[0], depth - 1) if producer is not None and producer.inputs else None


def _attention(value: ir.Value) -> ir.Node | None:
    return next((node for node, _ in _users(value) if "Attention" in node.op_type), None)


def _window(value: ir.Value) -> int | None:
    """Slots of a sliding-window cache, which holds the whole window from the first token on."""
    node = _attention(value)
    attribute = node.attributes.get("local_window_size") if node is not None else None
    return attribute.as_int() if attribute is not None and attribute.as_int() > 0 else None


def _head_size(value: ir.Value) -> int | None:
    """Elements of one head of the attention that reads the cache ``value``."""
    node = _attention(value)
    if node is None or "num_heads" not in node.attributes:
        return None
    heads = node.attributes["num_heads"].as_int()
    packed = len(node.inputs) < 2 or node.inputs[1] is None
    if packed:
        grouped = node.attributes.get("kv_num_heads")
        heads += 2 * (grouped.as_int() if grouped is not None else heads)
    width = _width(node.inputs[0])
    return width // heads if width else None


def _width(value: ir.Value | None, depth: int = _DEPTH) -> int | None:
    """Last dimension of a value, as declared or as its producer's weight tells."""
    if value is None or not depth:
        return None
    if value.shape is not None and value.shape.rank() and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    if node is None:
        return None
    if "N" in node.attributes:
        return node.attributes["N"].as_int()
    if node.op_type == "MatMul":
        return _width(node.inputs[1], depth - 1)
    widths = (_width(v, depth - 1) for v in node.inputs if v is not None)
    return next((w for w in widths if w is not None and w > 1), None)
