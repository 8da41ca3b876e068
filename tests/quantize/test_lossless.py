"""lossless: a weight that lies on a grid is read as that grid, all of it; one that is off in one place is not."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from drawn_grids import floats, integers, under
from hypothesis import given
from hypothesis import strategies as st

from rewriter.quantize.born import Look, look, off_grid
from rewriter.quantize.formats import E2M1, MXFP4, NVFP4
from rewriter.quantize.lossless import OffGridError, quantize, read
from rewriter.quantize.types import WeightContext, WeightSpec
from rewriter.tensors import View, interleaved, stacked

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]
SEEDS = st.integers(0, 2**31)


def whole(array):
    return View.whole(ir.tensor(array, name="w"), "w")


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([0, 16, 32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_integers_are_recovered(*, bits, block, symmetric, dtype, seed):
    if bits == 8 and dtype == DTYPES[1]:
        symmetric = True  # nine bits of multiples do not go into eight digits
    weight, made = integers(5, 256, bits, block, symmetric=symmetric, dtype=dtype, seed=seed)
    spec = WeightSpec("lossless", bits, block, symmetric)
    found = read(weight, spec, dtype).weight
    assert found is not None
    np.testing.assert_array_equal(found.codes, made.codes)
    np.testing.assert_array_equal(found.scales, made.scales)
    np.testing.assert_array_equal(found.dequantize().astype(dtype), weight)
    assert spec in look(whole(weight)).specs


@given(own=st.sampled_from([MXFP4, NVFP4]), dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_four_bit_floats_are_recovered_bit_by_bit(own, dtype, seed):
    weight, made = floats(6, 256, own, dtype=dtype, seed=seed)
    spec = WeightSpec("lossless", 4, own.block, True, own.name)
    found = read(weight, spec, dtype).weight
    assert found is not None
    np.testing.assert_array_equal(found.codes, made.codes)
    scales = found.scales.astype(np.float64) * found.global_scale
    np.testing.assert_array_equal(scales, made.scales.astype(np.float64))
    np.testing.assert_array_equal(found.dequantize(), made.dequantize())
    assert look(whole(weight)).specs[0] == spec


@given(dtype=st.sampled_from(DTYPES), unit=st.floats(2.0**-12, 2.0**-4, width=32), seed=SEEDS)
def test_nvfp4_is_recovered_under_any_global_scale(dtype, unit, seed):
    made = under(unit, seed)
    weight = made.dequantize().astype(dtype)
    spec = WeightSpec("lossless", 4, 16, True, "nvfp4")
    found = read(weight, spec, dtype).weight
    assert found is not None
    np.testing.assert_array_equal(found.codes, made.codes)
    np.testing.assert_array_equal(found.dequantize().astype(dtype), weight)
    if abs(np.log2(found.global_scale / unit)) < 0.1:  # not another power of two of it
        np.testing.assert_array_equal(found.scales, made.scales)
        assert found.global_scale == pytest.approx(unit, rel=2.0**-8)


def test_each_expert_has_a_global_scale_of_its_own():
    made = [under(unit, seed) for seed, unit in enumerate((0.0123, 0.0031, 0.0207))]
    stack = whole(np.stack([weight.dequantize().astype(np.float16) for weight in made]))
    spec = look(stack).specs[0]
    assert spec.format == "nvfp4"
    assert not off_grid(stack, spec)


@given(
    bits=st.sampled_from([2, 4]),
    symmetric=st.booleans(),
    stored=st.sampled_from([np.float16, np.float32]),
    scale=st.sampled_from([np.float16, ml_dtypes.bfloat16]),
    seed=SEEDS,
)
def test_integers_whose_products_were_rounded_to_bfloat16_keep_their_codes(bits, symmetric, stored, scale, seed):
    _, made = integers(5, 256, bits, 32, symmetric=symmetric, dtype=np.dtype(scale), seed=seed)
    weight = made.dequantize().astype(ml_dtypes.bfloat16).astype(stored)
    spec = WeightSpec("lossless", bits, 32, symmetric)
    assert spec in look(whole(weight)).specs
    found = read(weight, spec, np.dtype(stored)).weight
    np.testing.assert_array_equal(found.codes, made.codes)
    np.testing.assert_array_equal(found.dequantize().astype(ml_dtypes.bfloat16).astype(stored), weight)
    if scale == ml_dtypes.bfloat16:
        np.testing.assert_array_equal(found.scales.astype(np.float32), made.scales.astype(np.float32))


@given(
    grid=st.sampled_from(["mxfp4", "nvfp4", 2, 3, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
    data=st.data(),
)
def test_one_number_off_by_one_unit_in_one_place_is_not_taken(grid, dtype, seed, data):
    if isinstance(grid, str):
        own = {"mxfp4": MXFP4, "nvfp4": NVFP4}[grid]
        weight, made = floats(4, 256, own, dtype=dtype, seed=seed)
    else:
        weight, made = integers(4, 256, grid, 32, symmetric=True, dtype=dtype, seed=seed)
    row, column = data.draw(st.integers(0, 3)), data.draw(st.integers(3, 255))
    pattern = weight.view(f"u{dtype.itemsize}")
    pattern[row, column] ^= 1
    spec = WeightSpec("lossless", made.bits, made.block_size, True, made.format)
    found = read(weight, spec, dtype)
    if found.weight is None:
        place, wrong = (found.row, found.block), (row, column // made.block_size)
        # A number off may fit its block, and the global scale that is read from it then fits no other.
        assert place == wrong or grid == "nvfp4"
        first = found.block * made.block_size
        where = f"block (row {found.row}, columns {first} to {first + made.block_size - 1}) of 'w' is off the grid of "
        assert off_grid(whole(weight), spec).startswith(where)
        seen = look(whole(weight))
        assert seen.specs or seen.off.startswith(where)
        assert all(read(weight, other, dtype).weight is not None for other in seen.specs)
    else:  # another code may be what the nudged number is rounded from
        np.testing.assert_array_equal(found.weight.dequantize().astype(dtype), weight)


def test_every_spelling_of_a_stack_is_seen():
    experts = [floats(8, 64, MXFP4, dtype=np.float16, seed=seed)[0] for seed in range(4)]
    ups = [floats(8, 64, MXFP4, dtype=np.float16, seed=seed)[0] for seed in range(4, 8)]
    stack = whole(np.stack(experts))
    spec = WeightSpec("lossless", 4, 32, True, format="mxfp4")
    spelled = {
        "stacked": stack,
        "transposed": whole(np.ascontiguousarray(np.stack(experts).transpose(0, 2, 1))).transpose((0, 2, 1)),
        "apart": stacked([whole(expert) for expert in experts]),
        "interleaved": interleaved(stack, whole(np.stack(ups))),
    }
    for name, view in spelled.items():
        assert look(view).specs[0] == spec, name
        assert not off_grid(view, spec), name
    broken = np.stack(experts)
    broken[3, 7, 63] = np.float16(0.7)
    assert off_grid(whole(broken), spec) == (
        "block (expert 3, row 7, columns 32 to 63) of 'w' is off the grid of mxfp4"
    )


def spelled(spelling, experts):
    """A stack [E, N, K] of these matrices as exporters have it; or a table [E * N, K], of which rows are gathered."""
    flat = np.concatenate(experts)
    if spelling == "table":
        return whole(flat)
    if spelling == "flat":
        return whole(flat).reshape((len(experts), *experts[0].shape))
    if spelling == "side by side":
        return whole(np.ascontiguousarray(flat.T)).T.reshape((len(experts), *experts[0].shape))
    if spelling == "transposed":
        return whole(np.ascontiguousarray(np.stack(experts).transpose(0, 2, 1))).transpose((0, 2, 1))
    if spelling == "apart":
        return stacked([whole(expert) for expert in experts])
    if spelling == "interleaved":
        return interleaved(*(whole(np.stack([expert[half::2] for expert in experts])) for half in (0, 1)))
    return whole(np.stack(experts))


@given(
    grid=st.sampled_from([MXFP4, NVFP4, (2, 32), (3, 32), (4, 16), (4, 0), (8, 64)]),
    spelling=st.sampled_from(["stacked", "transposed", "apart", "interleaved", "flat", "side by side", "table"]),
    dtype=st.sampled_from(DTYPES),
    place=st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(3, 63)),
    seed=SEEDS,
)
def test_every_grid_is_kept_in_every_spelling_and_not_with_one_number_nudged(grid, spelling, dtype, place, seed):
    if isinstance(grid, tuple):
        how = {"symmetric": True, "dtype": dtype}
        made = [integers(8, 64, *grid, seed=seed + expert, **how) for expert in range(4)]
    else:
        made = [floats(8, 64, grid, dtype=dtype, seed=seed + expert) for expert in range(4)]
    own = made[0][1]
    spec = WeightSpec("lossless", own.bits, own.block_size, True, own.format)
    experts = [weight for weight, _ in made]
    view = spelled(spelling, experts)
    assert spec in look(view).specs and not off_grid(view, spec)
    table = view.rank == 2
    for expert, (_, quantized) in enumerate(made):
        matrix = view.slice(0, 8 * expert, 8) if table else view.index(0, expert)
        np.testing.assert_array_equal(read(matrix.numpy(), spec, dtype).weight.codes, quantized.codes)

    expert, row, column = place
    experts[expert] = experts[expert].copy()
    experts[expert].view(f"u{dtype.itemsize}")[row, column] ^= 1
    nudged = spelled(spelling, experts)
    if where := off_grid(nudged, spec):
        rows = range(8) if own.global_scale != 1 else [row]  # read from that number, it may fit no other block
        named = {f"row {8 * expert + r}" if table else f"expert {expert}, row {r}" for r in rows}
        assert where.removeprefix("block (").partition(", columns")[0] in named
    else:  # another code is what the nudged number is rounded from
        found = read(experts[expert], spec, dtype).weight
        np.testing.assert_array_equal(found.dequantize().astype(dtype), experts[expert])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ordinary_weight_lies_on_no_grid(dtype):
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(dtype)
    assert look(whole(weight)) == Look()
    assert look(whole(np.zeros((64, 256), dtype))) == Look()
    weight[5, 7] = np.inf
    assert look(whole(weight)) == Look()


def test_fp8_in_blocks_of_128_lies_on_no_grid():
    rng = np.random.default_rng(0)
    codes = (rng.standard_normal((256, 512)) * 60).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = np.repeat(np.repeat(rng.random((2, 4)) * 1e-3 + 1e-4, 128, axis=0), 128, axis=1)
    for dtype in DTYPES:
        assert not look(whole((codes * scales).astype(dtype))).specs


def test_a_weight_off_its_grid_is_an_error_that_says_where():
    weight, _ = floats(4, 64, MXFP4, dtype=np.float16, seed=0)
    weight[2, 40] = 0.3
    context = WeightContext(WeightSpec("lossless", 4, 32, True, format="mxfp4"), MXFP4.scale_dtype, weight="w")
    with pytest.raises(OffGridError, match=r"block \(row 2, columns 32 to 63\) of 'w' is off the grid of mxfp4"):
        quantize(weight, context)


def test_each_code_of_e2m1_is_what_the_specification_says():
    assert list(E2M1[:8]) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [-value for value in E2M1[:8]] == list(E2M1[8:]) and np.signbit(E2M1[8])
    np.testing.assert_array_equal(np.array(E2M1, ml_dtypes.float4_e2m1fn).view(np.uint8) & 15, np.arange(16))
