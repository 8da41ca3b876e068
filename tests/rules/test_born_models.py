"""Whole models whose weights were trained in few bits: every reader of a weight keeps its codes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from born_models import GPT_OSS, E, H, I, with_stacks
from drawn_grids import floats, integers, under
from embedding_models import exported, graph_of, initializer, recorded, run, with_weights
from moe_models import attributes_of, initializers_of, nodes_of, ort, rewrite

import rewriter
from rewriter.operators.gather_block_quantized import TABLE
from rewriter.operators.matmul_nbits import RAW
from rewriter.quantize.formats import MXFP4
from rewriter.quantize.types import QuantizedShape

CPU, CUDA, WEBGPU = "cpu@1.32", "cuda@1.31", "webgpu@1.31"
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GRIDS = [(2, 32, True), (4, 16, True), (4, 32, False), (4, 128, True), (8, 64, True), (2, 64, False)]
SPELLINGS = {  # model of gpt-oss -> its stacks of one block: [E, N, K], or [E, K, N] where they are turned
    "genai/gpt_oss_fp32_cpu": (["model.layers.0.moe.experts.gate_up_proj.weight"], False),
    "hf_exporter/gpt_oss__default": (["model.layers.0.mlp.experts.gate_up_proj"], True),
    "hf_blocks/gpt_oss__batched_mm__dynamo18": (["val_21", "val_70"], True),
    "torch_unroll/gptoss_getitem_bias_interleaved__dynamo18_opt": (["gate_up_proj", "down_proj"], True),
}


def in_half(model):
    """The model with float16 in place of float, but where rows are counted: exporters count in float32."""
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {t.name: t.data_type for t in graph.initializer}
    halved = {output.name for output in graph.output}  # and what they are computed of, as far as that is no index
    for node in reversed(graph.node):
        if halved.intersection(node.output):
            halved.update(name for name in node.input if kinds.get(name, single) == single)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        kind.elem_type = half if kind.elem_type == single else kind.elem_type
    both = {name for node in graph.node if not halved.intersection(node.output) for name in node.input}
    both &= halved & {t.name for t in graph.initializer}
    graph.initializer.extend(onnx.numpy_helper.from_array(initializer(model, name), f"{name}.single") for name in both)
    for node in graph.node:
        if not halved.intersection(node.output):
            node.input[:] = [f"{name}.single" if name in both else name for name in node.input]
    constants = [a.t for n in graph.node if halved.intersection(n.output) for a in n.attribute if a.HasField("t")]
    for tensor in (*(t for t in graph.initializer if t.name in halved), *constants):
        if tensor.data_type == single:
            array = np.clip(onnx.numpy_helper.to_array(tensor), -65504, 65504).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in graph.node:
        for attribute in node.attribute if halved.intersection(node.output) else ():
            if node.op_type == "Cast" and attribute.i == single:
                attribute.i = half
    return model


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_gpt_oss_as_exporters_write_it_keeps_its_mxfp4(name, half):
    names, turned = SPELLINGS[name]
    names = [*dict.fromkeys([*names, *(stack.replace("gate_up_proj", "down_proj") for stack in names)])]
    model, born = exported(name), {}
    for seed, stack in enumerate(names):
        experts, *shape = initializer(model, stack).shape
        n, k = shape[::-1] if turned else shape
        made = [floats(n, k, MXFP4, dtype=np.float32, seed=experts * seed + e)[0] / 16 for e in range(experts)]
        born[stack] = np.stack(made).swapaxes(1, 2).copy() if turned else np.stack(made)
    model = with_weights(model, born)
    model = in_half(model) if half else model
    whole = "genai" in name  # an MoE already
    result = rewrite(model, "moe-int4", CPU, overrides={"rounded_activations": whole})
    rewritten = result.model
    kept = [w for w in result.report.weights if set(w.sources) <= set(names)]
    assert len(kept) == sum(len(stack) for stack in born.values())
    assert {(w.relative_rms, w.grid) for w in kept} == {(0.0, "kept as it was trained")}
    alone = "blocks" in name or "unroll" in name
    fused = whole or half  # in float32 the kernel rounds what it multiplies
    assert {w.format for w in kept} == {"mxfp4" if fused else "int"}
    feeds, _ = recorded(name)
    feeds = {key: x.astype(np.float16) if half and x.dtype == np.float32 else x for key, x in feeds.items()}
    if alone:  # of a whole model, the rest is quantized too
        actual = run(rewritten, feeds)
        for key, value in run(model, feeds).items():
            difference = np.abs(actual[key].astype(float) - value.astype(float)).max()
            assert difference <= (4e-3 if half else 1e-5) * np.abs(value).max(), key
    if not fused:
        return
    node, arrays = nodes_of(rewritten, "QMoE")[0], initializers_of(rewritten)
    assert attributes_of(node)["quant_type"] == b"fp4"
    for slot, stack in zip((2, 5), names, strict=True):
        codes = arrays[node.input[slot]]
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        signs, magnitudes = np.where(codes & 8, -1.0, 1.0), LEVELS[codes & 7]
        scales = 2.0 ** (arrays[node.input[slot + 1]].view(np.uint8).astype(int) - 127.0)
        value = signs * magnitudes * np.repeat(scales, 32, axis=-1)
        np.testing.assert_array_equal(value, born[stack].swapaxes(1, 2) if turned else born[stack])


def on_grid(bits, block, symmetric, n, k, dtype, seed=0):
    return integers(n, k, bits, block, symmetric=symmetric, dtype=np.dtype(dtype), seed=seed)


def unpacked(model, node, stored):
    arrays = initializers_of(model)
    names = node.input[1:] if node.op_type == "MatMulNBits" else (node.input[0], *node.input[2:])
    return stored.unpack([arrays[name] for name in names])


def require_same(found, made):
    np.testing.assert_array_equal(found.codes, made.codes)
    np.testing.assert_array_equal(found.scales, made.scales)
    if made.zero_points is not None:
        np.testing.assert_array_equal(found.zero_points, made.zero_points)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_linear_keeps_its_codes(grid, turned, dtype):
    weight, made = on_grid(*grid, 96, 256, dtype)
    kind = np.dtype(dtype).name.replace("32", "")
    body = "y = MatMul(x, w)" if turned else "y = Gemm<transB=1>(x, w)"
    model = graph_of(
        f"agraph ({kind}[T, 256] x) => ({kind}[T, 96] y) {{ {body} }}", {"w": weight.T.copy() if turned else weight}
    )
    result = rewrite(model, "moe-int4", CPU)
    (node,) = nodes_of(result.model, "MatMulNBits")
    own = attributes_of(node)
    assert (own["bits"], own["block_size"]) == grid[:2]
    shape = QuantizedShape(96, 256, *grid)
    require_same(unpacked(result.model, node, RAW.require(shape)), made)
    assert [w.grid for w in result.report.weights] == ["kept as it was trained"]
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(dtype)
    (actual,), expected = run(result.model, {"x": x}).values(), x.astype(np.float64) @ made.dequantize().T.astype(float)
    assert np.abs(actual - expected).max() <= (2e-3 if dtype == np.float16 else 2e-2) * np.abs(expected).max()


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_a_linear_that_was_rounded_to_bfloat16_keeps_its_codes(stored):
    _, made = on_grid(4, 32, True, 96, 256, ml_dtypes.bfloat16)
    weight = made.dequantize().astype(ml_dtypes.bfloat16).astype(stored)
    kind = np.dtype(stored).name.replace("32", "")
    model = graph_of(f"agraph ({kind}[T, 256] x) => ({kind}[T, 96] y) {{ y = Gemm<transB=1>(x, w) }}", {"w": weight})
    result = rewrite(model, "moe-int4", CPU)
    (node,) = nodes_of(result.model, "MatMulNBits")
    found = unpacked(result.model, node, RAW.require(QuantizedShape(96, 256, 4, 32)))
    np.testing.assert_array_equal(found.codes, made.codes)
    np.testing.assert_array_equal(found.scales, made.scales.astype(stored))


def test_a_linear_in_mxfp4_has_eight_bits_and_no_error():
    weight, _ = floats(96, 256, MXFP4, dtype=np.float16, seed=0)
    model = graph_of("agraph (float16[T, 256] x) => (float16[T, 96] y) { y = Gemm<transB=1>(x, w) }", {"w": weight})
    result = rewrite(model, "moe-int4", CPU)
    assert nodes_of(result.model, "MatMulNBits")
    (found,) = result.report.weights
    assert (found.bits, found.relative_rms, found.grid) == (8, 0.0, "kept as it was trained")


def test_experts_of_one_node_get_the_planned_bits_where_the_kernel_of_their_grid_rounds_unasked():
    name = "genai/gpt_oss_fp32_cpu"
    names, turned = SPELLINGS[name]
    model = exported(name)
    for seed, stack in enumerate(names):
        e, *shape = initializer(model, stack).shape
        n, k = shape[::-1] if turned else shape
        made = np.stack([floats(n, k, MXFP4, dtype=np.float32, seed=seed + i)[0] / 16 for i in range(e)])
        model = with_weights(model, {stack: made.swapaxes(1, 2).copy() if turned else made})
    result = rewrite(model, "moe-int4", CPU)
    written = [attributes_of(node) for node in nodes_of(result.model, "QMoE")]
    assert {(found["expert_weight_bits"], found.get("quant_type")) for found in written} == {(4, None)}
    experts = [weight for weight in result.report.weights if set(weight.sources) <= set(names)]
    assert {(weight.format, weight.algorithm, weight.grid) for weight in experts} == {("int", "mse-search", "")}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_table_that_is_looked_up_keeps_its_codes(grid):
    weight, made = on_grid(*grid, 120, 256, np.float16)
    model = graph_of("agraph (int64[b, s] ids) => (float16[b, s, 256] y) { y = Gather(w, ids) }", {"w": weight})
    result = rewrite(model, "moe-int4", CPU)
    (node,) = nodes_of(result.model, "GatherBlockQuantized")
    require_same(unpacked(result.model, node, TABLE.require(QuantizedShape(120, 256, *grid))), made)
    ids = np.array([[0, 119, 7]])
    np.testing.assert_array_equal(run(result.model, {"ids": ids})["y"], weight[ids])


@pytest.mark.parametrize("name", ["genai/llama_tied_fp32_cpu", "mobius/llama_tied_dense_f32"])
@pytest.mark.parametrize("grid", [(4, 32, True), (2, 16, True), (8, 32, True), (4, 32, False)])
def test_a_tied_table_keeps_its_codes(name, grid):
    table, by_columns = {"genai/llama_tied_fp32_cpu": ("lm_head.MatMul.weight", True)}.get(
        name, ("model.embed_tokens.weight", False)
    )
    weight, made = on_grid(*grid, 512, 64, np.float32)
    model = with_weights(exported(name), {table: weight.T.copy() if by_columns else weight})
    result = rewriter.apply(model, "moe-int4", target=CPU)
    assert result.report.applied["tie-quantized-embedding"] == 1
    (head,) = [n for n in nodes_of(result.model, "MatMulNBits") if attributes_of(n)["N"] == 512]
    require_same(unpacked(result.model, head, RAW.require(QuantizedShape(512, 64, *grid))), made)
    assert {w.grid for w in result.report.weights if table in w.sources} == {"kept as it was trained"}
    feeds, _ = recorded(name)
    assert run(result.model, feeds)


@pytest.mark.parametrize("turned", [True, False])
def test_a_stack_that_is_gathered_keeps_its_codes(turned):
    made = [on_grid(4, 32, True, 64, 128, np.float32, seed) for seed in range(4)]
    stack = np.stack([weight for weight, _ in made])
    product = "y = MatMul(h, g)" if turned else "t = Transpose<perm=[0, 2, 1]>(g) y = MatMul(h, t)"
    text = f"""agraph (float[b, 128] x, int64[b] ids) => (float[b, 1, 64] y) {{
        axes = Constant<value_ints=[1]>() g = Gather(w, ids) h = Unsqueeze(x, axes) {product} }}"""
    model = graph_of(text, {"w": stack.swapaxes(1, 2).copy() if turned else stack})
    result = rewrite(model, "moe-int4", CPU)
    (node,) = nodes_of(result.model, "GatherBlockQuantized")
    arrays, stored = initializers_of(result.model), TABLE.require(QuantizedShape(64, 128, 4, 32))
    for expert, (_, own) in enumerate(made):
        require_same(stored.unpack([arrays[node.input[slot]][expert] for slot in (0, 2)]), own)
    assert {w.grid for w in result.report.weights} == {"kept as it was trained"}


def bytes_for_cuda(grid, n, k, seed):
    """A stack's bytes as CUDA reads them and the weight that they stand for, from the formats' own definitions."""
    rng = np.random.default_rng(seed)
    block = {"mxfp4": 32, "nvfp4": 16}[grid]
    codes = rng.integers(0, 16, (E, n, k), dtype=np.uint8)
    codes[:, :, ::block] = rng.choice([6, 7, 14, 15], (E, n, k // block))  # else another scale may mean the same
    if grid == "mxfp4":
        scale_bytes = rng.integers(118, 124, (E, n, k // block), dtype=np.uint8)
        scales, unit = 2.0 ** (scale_bytes.astype(int) - 127), 1.0
    else:
        scale_bytes = rng.integers(0x30, 0x7F, (E, n, k // block), dtype=np.uint8)
        scale_bytes[:, 0, 0] = 0x7E  # 448, the largest, as whoever rounds to nvfp4 has it
        exponents, digits = scale_bytes >> 3, scale_bytes & 7
        scales, unit = (8 + digits) * 2.0 ** (exponents.astype(int) - 10), 2.0**-11
    value = np.empty((E, n, k))
    for code in range(16):
        magnitude = LEVELS[code % 8]
        value[codes == code] = np.copysign(magnitude, -1 if code > 7 else 1)
    for column in range(k):
        value[:, :, column] *= scales[:, :, column // block] * unit
    packed = np.zeros((E, k, n // 2), np.uint8)
    for row in range(n):
        packed[:, :, row // 2] |= codes[:, row, :] << (4 * (row % 2))
    return value, packed, scale_bytes, np.full(E, unit, np.float32)


def usual(grid, value):
    """Codes, bytes of scales and global scale as whoever rounds a stack to the format has them: by largest numbers."""
    block = {"mxfp4": 32, "nvfp4": 16}[grid]
    blocks = value.reshape(*value.shape[:2], -1, block)
    most = np.abs(blocks).max(axis=-1)
    if grid == "mxfp4":
        exponents = np.floor(np.log2(most)) - 2  # MX 1.0, 6.3
        scales, unit, scale_bytes = 2.0**exponents, np.ones(E), (exponents + 127).astype(np.uint8)
    else:
        on_levels = 6 * np.abs(blocks)[..., None] == (most[..., None] * LEVELS)[..., None, :]
        scales = np.where(on_levels.any(axis=-1).all(axis=-1), most / 6, most / 4)  # 6 times a scale, where all fits
        unit = 2.0 ** np.ceil(np.log2(scales.max(axis=(1, 2)) / 448))
        digits, exponents = np.frexp(scales / unit[:, None, None])
        scale_bytes = (8 * (exponents + 6) + digits * 16 - 8).astype(np.uint8)
    levels = blocks / scales[..., None]
    codes = np.searchsorted(LEVELS, np.abs(levels)) + 8 * np.signbit(levels)
    return codes.reshape(value.shape).astype(np.uint8), scale_bytes, unit.astype(np.float32)


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4"])
def test_of_the_spellings_of_a_block_cuda_gets_that_of_its_largest_number(grid):
    """Codes at random, some without a 4 or 6: half the scale and twice the codes are the same numbers."""
    rng, block = np.random.default_rng(3), {"mxfp4": 32, "nvfp4": 16}[grid]
    drawn, values = [], []
    for n, k in ((2 * I, H), (H, I)):
        codes = rng.integers(0, 16, (E, n, k), dtype=np.uint8)
        codes[1, :7, :block] &= 0b1101  # no 4, no 6
        if grid == "mxfp4":
            scales = 2.0 ** rng.integers(-9, -5, (E, n, k // block))
        else:
            scales = (rng.random((E, n, k // block)) * 0.2 + 0.05).astype(ml_dtypes.float8_e4m3fn).astype(float) * 0.5
        magnitudes = LEVELS[codes & 7]
        values.append(np.copysign(magnitudes * np.repeat(scales, block, axis=-1), 7.5 - codes))
        drawn.append((codes, scales))
    result = rewrite(with_stacks(*(value.astype(np.float16) for value in values), GPT_OSS), "moe-int4", CUDA)
    (node,) = nodes_of(result.model, "QMoE")
    found = {t.name: t for t in result.model.graph.initializer}
    for value, (codes, scales), slots in zip(values, drawn, ((2, 3, 15), (5, 6, 16)), strict=True):
        wanted, scale_bytes, unit = usual(grid, value)
        packed = wanted[:, 0::2].swapaxes(1, 2) | wanted[:, 1::2].swapaxes(1, 2) << 4
        stored = [found[node.input[slot]].raw_data for slot in slots]
        assert stored == [packed.tobytes(), scale_bytes.tobytes(), unit.tobytes()]
        other = (wanted != codes).reshape(*scales.shape, block).any(axis=-1)
        low = (codes & 7).reshape(*scales.shape, block).max(axis=-1) < 6
        assert low[other].all() and 7 <= other.sum() < 0.02 * other.size


@pytest.mark.parametrize("rounded", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4"])
def test_cuda_gets_the_bytes_that_the_formats_define(grid, rounded):
    made = bytes_for_cuda(grid, 2 * I, H, 0), bytes_for_cuda(grid, H, I, 1)
    model = with_stacks(*(value.astype(rounded).astype(np.float16) for value, *_ in made), GPT_OSS)
    result = rewrite(model, "moe-int4", CUDA)
    (node,) = nodes_of(result.model, "QMoE")
    found = {t.name: t for t in result.model.graph.initializer}
    scale_type = {"mxfp4": onnx.TensorProto.FLOAT8E8M0, "nvfp4": onnx.TensorProto.FLOAT8E4M3FN}[grid]
    for (_, codes, scales, unit), slots in zip(made, ((2, 3, 15), (5, 6, 16)), strict=True):
        stored = [found[node.input[slot]] for slot in slots]
        assert [t.data_type for t in stored] == [onnx.TensorProto.UINT8, scale_type, onnx.TensorProto.FLOAT]
        assert [t.raw_data for t in stored] == [codes.tobytes(), scales.tobytes(), unit.tobytes()]
        assert [list(t.dims) for t in stored] == [list(a.shape) for a in (codes, scales, unit)]


def test_webgpu_gets_mxfp4_in_eight_bits_without_error():
    made = bytes_for_cuda("mxfp4", 2 * I, H, 0)[0], bytes_for_cuda("mxfp4", H, I, 1)[0]
    model = with_stacks(*(value.astype(np.float16) for value in made), GPT_OSS)
    result = rewrite(model, "moe-int4", WEBGPU)
    (node,) = nodes_of(result.model, "QMoE")
    own, arrays = attributes_of(node), initializers_of(result.model)
    assert own["expert_weight_bits"] == 8 and "quant_type" not in own
    for value, slot in zip(made, (2, 5), strict=True):
        codes, scales = arrays[node.input[slot]].astype(float), arrays[node.input[slot + 1]].astype(float)
        np.testing.assert_array_equal((codes - 128) * np.repeat(scales, own["block_size"], axis=-1), value)
    assert {(w.relative_rms, w.grid) for w in result.report.weights} == {(0.0, "kept as it was trained")}


def test_experts_of_nvfp4_with_a_global_scale_each_are_kept_and_run():
    halves = [np.stack([under(unit, seed).dequantize() for unit in (0.01, 0.0033, 0.02, 0.007)]) for seed in range(2)]
    fc1 = np.concatenate([halves[0]] * 22, axis=1)[:, : 2 * I, :H].astype(np.float16)
    fc2 = np.concatenate([halves[1]] * 22, axis=1)[:, :H, :I].astype(np.float16)
    model = with_stacks(fc1, fc2)
    result = rewrite(model, "moe-int4", CPU, overrides={"parity.local": "all"})
    (node,) = nodes_of(result.model, "QMoE")
    assert attributes_of(node)["quant_type"] == b"nvfp4"
    units = initializers_of(result.model)[node.input[15]]
    assert len(set(units.tolist())) == E and units.dtype == np.float32
    x = np.random.default_rng(0).standard_normal((5, H)).astype(np.float16)
    router = np.random.default_rng(1).standard_normal((5, E)).astype(np.float16)
    feeds = {"x": x, "router": router}
    assert np.abs(ort(result.model, feeds) - ort(model, feeds)).max() < 4e-3 * np.abs(ort(model, feeds)).max()
