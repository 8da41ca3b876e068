"""Lazy constants: views of stored tensors, stacks and joins of views, and tensors mapped from files."""

from rewriter.tensors.constant import constant
from rewriter.tensors.joined import joined
from rewriter.tensors.mapped import MappedTensor, drop_pages
from rewriter.tensors.names import names_of, weight_name
from rewriter.tensors.stack import StackedCopy, interleaved, scaled, stacked
from rewriter.tensors.view import Array, ContiguousCopy, RowsTensor, View, ViewTensor, same_elements

__all__ = [
    "Array",
    "ContiguousCopy",
    "MappedTensor",
    "RowsTensor",
    "StackedCopy",
    "View",
    "ViewTensor",
    "constant",
    "drop_pages",
    "interleaved",
    "joined",
    "names_of",
    "same_elements",
    "scaled",
    "stacked",
    "weight_name",
]
