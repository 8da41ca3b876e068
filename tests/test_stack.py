"""Stacks: views along a new axis; nothing is read before it is written, and then one expert at a time."""

from __future__ import annotations

import io

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.tensors import RowsTensor, View, ViewTensor, interleaved, names_of, scaled, stacked


class Counted(ir.LazyTensor):
    """A tensor that counts how often it is read."""

    def __init__(self, array, name="w"):
        super().__init__(self._read, ir.DataType.FLOAT, ir.Shape(array.shape), name=name)
        self._array, self.reads = array, 0

    def _read(self):
        self.reads += 1
        return ir.tensor(self._array)


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def view(values, name="w"):
    return View.whole(ir.tensor(values, name=name), name)


def written(shown):
    file = io.BytesIO()
    ViewTensor(shown).tofile(file)
    return np.frombuffer(file.getvalue(), np.float32).reshape(shown.shape)


def test_slices_of_one_tensor_are_a_view_of_it():
    stack = array(4, 6, 5)
    whole = view(stack)
    same = stacked([whole.index(0, e) for e in range(4)])
    assert same == whole and same.is_whole
    turned = stacked([whole.index(0, e).T for e in (3, 2, 1, 0)])
    assert turned.source is whole.source
    np.testing.assert_array_equal(turned.numpy(), stack[::-1].swapaxes(1, 2))
    uneven = stacked([whole.index(0, e) for e in (0, 1, 3)])
    assert isinstance(uneven.source, RowsTensor)
    np.testing.assert_array_equal(uneven.numpy(), stack[[0, 1, 3]])


def test_rows_that_are_stored_in_turn_are_the_tensor_itself():
    stack = array(4, 5, 6)
    stored = view(stack)
    halves = [stored.transpose((0, 2, 1)).slice(1, start, 3, 2) for start in (0, 1)]
    assert interleaved(*halves) == stored.transpose((0, 2, 1))
    apart = [stored.transpose((0, 2, 1)).slice(1, start, 3) for start in (0, 3)]
    expected = np.stack([stack[:, :, :3], stack[:, :, 3:]], axis=3).reshape(4, 5, 6).swapaxes(1, 2)
    np.testing.assert_array_equal(interleaved(*apart).numpy(), expected)


@pytest.mark.parametrize("rank", [2, 3])
def test_tensors_of_their_own_are_read_when_written_and_one_at_a_time(rank):
    tensors = [Counted(array(6, 4, seed=e) if rank == 3 else array(6, seed=e), f"e.{e}.w") for e in range(5)]
    shown = stacked([View.whole(tensor, tensor.name) for tensor in tensors])
    assert shown.name == "e" and shown.shape[0] == 5 and not any(t.reads for t in tensors)
    np.testing.assert_array_equal(shown.index(0, 3).numpy(), tensors[3]._array)
    assert [t.reads for t in tensors] == [0, 0, 0, 1, 0]
    np.testing.assert_array_equal(written(shown), np.stack([t._array for t in tensors]))
    assert [t.reads for t in tensors] == [1, 1, 1, 2, 1]


def test_gate_and_up_of_their_own_in_turn():
    gates, ups = ([view(array(3, 4, seed=2 * e + i), f"{i}.{e}") for e in range(4)] for i in range(2))
    fc1 = interleaved(stacked(gates), stacked(ups))
    expected = np.stack([np.stack([g.numpy(), u.numpy()], 1).reshape(6, 4) for g, u in zip(gates, ups, strict=True)])
    np.testing.assert_array_equal(fc1.numpy(), expected)
    np.testing.assert_array_equal(written(fc1), expected)
    np.testing.assert_array_equal(fc1.index(0, 2).numpy(), expected[2])


def test_transposed_matrices_are_written_row_by_row():
    gates, ups = ([array(130, 6, seed=2 * e + i) for e in range(2)] for i in range(2))
    fc1 = interleaved(*(stacked([view(a).T for a in side]) for side in (gates, ups)))
    expected = np.stack([np.stack([g.T, u.T], 1).reshape(12, 130) for g, u in zip(gates, ups, strict=True)])
    np.testing.assert_array_equal(fc1.numpy(), expected)
    np.testing.assert_array_equal(written(fc1), expected)


def test_every_stored_name_that_is_shown():
    gates, ups = (stacked([view(array(3, 4), f"{side}.{e}") for e in range(4)]) for side in ("gate", "up"))
    fc1 = interleaved(gates, ups)
    assert names_of(fc1.index(0, 2))[1] == ("gate.2", "up.2")
    assert names_of(gates.index(0, 1).T)[1] == ("gate.1",) and names_of(gates)[1] == tuple(
        f"gate.{e}" for e in range(4)
    )
    assert names_of(view(array(3, 4)))[1] == ("w",)


def test_factors():
    stack = view(array(3, 4, 2))
    assert scaled(stack, [1.0, 1.0, 1.0]) is stack
    twice = scaled(stack, [1.0, 2.0, 0.5])
    np.testing.assert_array_equal(twice.numpy(), stack.numpy() * np.array([1, 2, 0.5], np.float32)[:, None, None])
    np.testing.assert_array_equal(written(twice)[1], 2 * stack.numpy()[1])


def test_equal_stacks_are_equal():
    views = [view(array(3, 2, seed=e), f"w{e}") for e in range(3)]
    assert stacked(views) == stacked(list(views)) != stacked(views[::-1])
    assert scaled(stacked(views), [1, 2, 3]) == scaled(stacked(views), [1, 2, 3]) != scaled(stacked(views), [1, 2, 4])
    assert ViewTensor(stacked(views)).key == ViewTensor(stacked(views)).key


def assembled(how, experts):
    """Matrices [3, 8, 6] of their own as a stack, as rows in turn, or laid out afresh, and what that is."""
    own = [view(a, f"w{i}") for i, a in enumerate(experts)]
    if how == "stacked":
        return stacked(own), np.stack(experts)
    if how == "interleaved":
        shown = interleaved(stacked(own), stacked([view(a + 1, f"u{i}") for i, a in enumerate(experts)]))
        return shown, np.stack([np.stack([a, a + 1], axis=1).reshape(16, 6) for a in experts])
    return view(np.stack(experts)).transpose((0, 2, 1)).reshape((3, 48)), np.stack([a.T.reshape(-1) for a in experts])


@given(
    how=st.sampled_from(["stacked", "interleaved", "afresh"]),
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 4)), min_size=3, max_size=3),
    turned=st.booleans(),
)
def test_a_window_shows_what_an_array_would(how, steps, turned):
    shown, whole = assembled(how, [array(8, 6, seed=seed) for seed in range(3)])
    for axis, (first, most, step) in enumerate(steps[: shown.rank]):
        start = first % shown.shape[axis]
        count = min(most, (shown.shape[axis] - start - 1) // step + 1)
        shown = shown.slice(axis, start, count, step)
        whole = np.moveaxis(np.moveaxis(whole, axis, 0)[start : start + (count - 1) * step + 1 : step], 0, axis)
    shown, whole = (shown.T, whole.T) if turned else (shown, whole)
    np.testing.assert_array_equal(shown.numpy(), whole)


def test_a_row_of_one_of_many_is_read_where_it_is_stored():
    gates, ups = ([array(8, 6, seed=seed) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    both = interleaved(stacked([view(a) for a in gates]), stacked([view(a) for a in ups]))
    assert np.shares_memory(both.index(0, 1).slice(0, 5, 1).numpy(), ups[1])
    assert np.shares_memory(both.index(0, 0).slice(0, 0, 4, 2).slice(1, 2, 3).numpy(), gates[0])
    assert np.shares_memory(stacked([view(a) for a in gates]).index(0, 1).numpy(), gates[1])
