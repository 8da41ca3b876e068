"""Which operators move values, mix them, or read weights: one table per way in which an operator treats its inputs.

Operators are keyed by type alone: the standard operator and its ``com.microsoft`` twin treat their inputs alike.
An operator in no table is opaque.
"""

from __future__ import annotations

from typing import Final

from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS

LINEAR: Final = frozenset({
    "MatMul", "Gemm", "Einsum", MATMUL_NBITS.name, "FusedMatMul", "TransposeMatMul", "MatMulBnb4", "MatMulFpQ4",
    "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight", "DynamicQuantizeMatMul",
})  # fmt: skip
"""Contractions; linear maps where one operand is a weight."""

FUSED_EXPERTS: Final = frozenset(operator.name for operator in EXPERTS)

ATTENTION: Final = frozenset({
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "PagedAttention", "SparseAttention",
    "SparsePagedAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "PackedAttention",
    "PackedMultiHeadAttention", "LongformerAttention", "LinearAttention", "GatedDeltaNet", "QAttention",
})  # fmt: skip

TOP_K: Final = frozenset({"TopK", "ArgMax"})

GATHER: Final = frozenset({"Gather", "GatherND", "GatherElements", GATHER_BLOCK_QUANTIZED.name, "Compress"})
"""Input 1 chooses among the elements of input 0."""

SCATTER: Final = frozenset({"ScatterElements", "ScatterND", "Scatter", "TensorScatter"})

ACTIVATION: Final = frozenset({
    "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu",
    "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasSplitGelu", "HardSwish", "Swish", "Silu", "Mish", "Softplus",
    "Softsign", "Exp", "Softmax", "LogSoftmax", "BiasSoftmax", "ScaledSiLU",
})  # fmt: skip

SOFTMAX: Final = frozenset({"Softmax", "LogSoftmax", "BiasSoftmax", "Exp", "Sigmoid"})
"""What turns scores into attention weights."""

PARTS: Final = frozenset({"Split", "SplitToSequence", "SequenceAt", "Slice"})
"""Movement whose output is only a part of input 0."""

MOVEMENT: Final = PARTS | {
    "Identity", "Cast", "CastLike", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad",
    "Trilu", "CumSum", "ConcatFromSequence", "DepthToSpace", "SpaceToDepth", "Dropout", "ExpandDims",
    "QuantizeLinear", "DequantizeLinear",
    "Clip", "Neg", "Abs", "Sqrt", "Reciprocal", "Log", "Floor", "Ceil", "Round", "Sign",
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp",
    "ReduceProd",
    "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "LpNormalization", "GroupNormalization",
    "InstanceNormalization", "MeanVarianceNormalization", "GatedRMSNorm",
    "RotaryEmbedding", "GemmaRotaryEmbedding", "MRotaryEmbedding",
}  # fmt: skip
"""The output says what input 0 says; the other inputs are parameters. Norms and rotary embeddings are among them."""

ADD: Final = frozenset({
    "Add", "Sub", "Sum", "Mean", "Max", "Min", "BiasAdd",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm", "EmbedLayerNormalization",
})  # fmt: skip

MULTIPLY: Final = frozenset({"Mul", "Div", "Pow"})

CHOOSE: Final = frozenset({"Concat", "Where", "SequenceConstruct", "SequenceInsert"})
"""Every element of the output comes from one of the inputs."""

COMPARE: Final = frozenset({
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor", "BitwiseAnd", "BitwiseOr",
    "OneHot", "NonZero", "Range", "Mod", "BitShift", "Unique",
})  # fmt: skip

SHAPE: Final = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike", "RandomNormalLike", "RandomUniformLike"})
"""What depends on shapes alone."""

CONTROL: Final = frozenset({"If", "Loop", "Scan"})
