"""Views against NumPy: every chain of them shows what the same chain of array operations does, and copies nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rewriter.tensors import ContiguousCopy, View, ViewTensor, constant


def stored(*shape, dtype=np.float32, name="w"):
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    return View.whole(ir.tensor(array, name=name), name), array


@st.composite
def chains(draw):
    """A view and the array that it must show."""
    view, array = stored(*draw(st.lists(st.integers(0, 4), max_size=4)))
    for _ in range(draw(st.integers(0, 5))):
        move = draw(st.sampled_from(("slice", "index", "transpose", "reshape")))
        if move == "transpose":
            perm = draw(st.permutations(range(view.rank)))
            view, array = view.transpose(perm), array.transpose(perm)
        elif move == "reshape":
            shape = _regrouped(draw, array.shape)
            view, array = view.reshape(shape), array.reshape(shape)
        else:
            assume(view.rank)
            axis = draw(st.integers(0, view.rank - 1))
            extent = view.shape[axis]
            if move == "index":
                assume(extent)
                at = draw(st.integers(0, extent - 1))
                view, array = view.index(axis, at), np.take(array, at, axis)
            else:
                where = range(extent)[:: draw(st.sampled_from((1, 2, -1, -2)))]
                where = where[draw(st.integers(0, 2)) :]
                view = view.slice(axis, where.start, len(where), where.step)
                array = np.take(array, list(where), axis)
    return view, array


def _regrouped(draw, shape):
    """Another shape with as many elements: some neighbours merged, some extents split."""
    result = []
    for extent in shape:
        if result and draw(st.booleans()):
            result[-1] *= extent
        else:
            result.append(extent)
    halved = [
        (2, extent // 2) if extent and extent % 2 == 0 and draw(st.booleans()) else (extent,) for extent in result
    ]
    result = [extent for parts in halved for extent in parts]
    if draw(st.booleans()):
        result.insert(draw(st.integers(0, len(result))), 1)
    return tuple(result)


@given(chains())
def test_a_chain_of_views_is_a_chain_of_array_operations(drawn):
    view, array = drawn
    assert view.shape == array.shape and view.size == array.size and view.rank == array.ndim
    np.testing.assert_array_equal(view.numpy(), array)
    np.testing.assert_array_equal(ViewTensor(view).numpy(), array)
    assert view.nbytes == array.nbytes


@given(chains())
def test_a_view_can_be_written_and_serialized(drawn):
    view, array = drawn
    proto = ir.to_proto(ViewTensor(view))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto), array)


@given(chains())
def test_equal_windows_are_equal_views(drawn):
    view, _ = drawn
    again = view.transpose(range(view.rank)).reshape(view.shape)
    assert again == view and hash(again) == hash(view)
    same = ViewTensor(view)
    assert View.whole(same, "other") == view


def test_the_same_reshape_twice_is_one_view():
    view, _ = stored(2, 3, 4)
    first, second = (view.T.reshape((24,)) for _ in range(2))
    assert isinstance(first.source, ContiguousCopy)
    assert first == second and hash(first) == hash(second)


LABELS = {
    "w": lambda v: v,
    "w__slice_2": lambda v: v.index(0, 2),
    "w__slice_1__T": lambda v: v.index(0, 1).T,
    "w__slice_0": lambda v: v.slice(0, 0, 1),
    "w__view": lambda v: v.slice(1, 1, 2),
}


@pytest.mark.parametrize("label", LABELS)
def test_canonical_names(label):
    view, _ = stored(3, 4, 5)
    assert LABELS[label](view).label == label


def test_a_transposed_matrix_has_a_name_too():
    view, _ = stored(4, 5)
    assert view.T.label == "w__T" and view.T.T.label == "w"


@pytest.mark.parametrize("shape", [(3, 1, 5), (3, 4, 1), (1, 4, 5), (3, 1, 1)])
def test_names_of_experts_with_extents_of_one(shape):
    view, _ = stored(*shape)
    for expert in range(shape[0] if shape[0] > 1 else 0):
        assert view.index(0, expert).label.startswith(f"w__slice_{expert}")
        assert view.index(0, expert).expert == expert


def test_which_expert_a_view_shows():
    view, _ = stored(3, 4, 5)
    assert view.index(0, 2).expert == 2 and view.index(0, 2).T.expert == 2
    assert view.expert is None and view.slice(1, 0, 2).expert is None
    assert view.slice(0, 1, 2).expert is None
    assert stored(4, 5)[0].index(0, 1).expert is None, "a row of a matrix is no expert"


CASTS = [
    (ir.DataType.FLOAT16, ir.DataType.FLOAT, True),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT, True),
    (ir.DataType.FLOAT, ir.DataType.FLOAT16, False),
    (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, False),
    (ir.DataType.INT32, ir.DataType.INT64, True),
    (ir.DataType.INT64, ir.DataType.INT32, False),
    (ir.DataType.FLOAT, ir.DataType.FLOAT, True),
]


@pytest.mark.parametrize(("source", "target", "exact"), CASTS)
def test_a_cast_is_a_view_where_it_keeps_every_value(source, target, exact):
    view = View.whole(ir.tensor(np.arange(6).astype(source.numpy()), dtype=source, name="w"), "w")
    shown = view.cast(target)
    assert (shown is not None) == exact
    if shown is not None:
        assert shown.dtype == target and shown.numpy().dtype == target.numpy()
        np.testing.assert_array_equal(shown.numpy().astype(np.float64), np.arange(6))
        assert ViewTensor(shown).dtype == target


def test_views_read_nothing_until_they_are_read():
    def never():
        raise AssertionError("it was read")

    lazy = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=ir.Shape((3, 4, 5)), name="w")
    view = View.whole(lazy, "w").index(0, 1).T.reshape((20,)).reshape((4, 5))
    tensor = ViewTensor(view)
    assert (view.label, tensor.shape.numpy(), view.expert) != (None, None, None)
    assert hash(view) == hash(view.T.T)


CONSTANTS = {
    "an initializer": ("<float[2] w = {1, 2}> { y = Identity (w) }", [1.0, 2.0]),
    "value": ("{ w = Constant <value = float[2] {1, 2}> () y = Identity (w) }", [1.0, 2.0]),
    "value_floats": ("{ w = Constant <value_floats = [1.0, 2.0]> () y = Identity (w) }", [1.0, 2.0]),
    "value_float": ("{ w = Constant <value_float = 1.5> () y = Identity (w) }", 1.5),
    "value_ints": ("{ w = Constant <value_ints = [1, 2]> () y = Identity (w) }", [1, 2]),
    "value_int": ("{ w = Constant <value_int = 3> () y = Identity (w) }", 3),
    "a string": ('{ w = Constant <value_string = "no"> () y = Identity (w) }', None),
    "computed": ("<float[2] v = {1, 2}> { w = Neg (v) y = Identity (w) }", None),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_what_is_constant(kind):
    body, expected = CONSTANTS[kind]
    text = f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[2] x) => (float[2] y) {body}'
    model = ir.from_onnx_text(text)
    (node,) = (node for node in model.graph if node.op_type == "Identity")
    view = constant(node.inputs[0])
    assert (view is None) == (expected is None)
    if view is not None:
        np.testing.assert_array_equal(view.numpy(), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(32, dtype=np.float32).reshape(4, 8)[:, ::2],
        np.arange(8, dtype=np.float32)[::-1],
        np.broadcast_to(np.float32(3), (4, 8)),
    ],
    ids=["every-other", "backwards", "broadcast"],
)
def test_a_tensor_that_steps_through_its_memory_is_shown_as_it_reads(array):
    """NumPy flattens such an array without a copy, so that neighbours in it are none in memory."""
    view = View.whole(ir.tensor(array, name="w"), "w")
    assert np.array_equal(view.numpy(), array)
    assert np.array_equal(view.slice(0, 1, 2).numpy(), array[1:3])


def test_what_a_caller_may_change_is_not_constant():
    graph = "g (float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Neg (w) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{graph}')
    assert model.graph.initializers and constant(model.graph.inputs[0]) is None


def test_a_constant_that_a_function_is_given_is_not_known():
    node = ir.Node("", "Constant", [], attributes=[ir.RefAttr("value", "given", ir.AttributeType.TENSOR)])
    assert constant(node.outputs[0]) is None
