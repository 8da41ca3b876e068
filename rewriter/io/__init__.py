"""Models and files: weights stay on disk until they are written, and output appears complete or not at all."""

from rewriter.io.copies import Exported, Model, Plain, as_model, held, own_copy
from rewriter.io.external import bytes_on_disk, data_names, files_read
from rewriter.io.loading import copied, load, parsed, source_path
from rewriter.io.place import Place
from rewriter.io.saving import save, to_proto

__all__ = [
    "Exported",
    "Model",
    "Place",
    "Plain",
    "as_model",
    "bytes_on_disk",
    "copied",
    "data_names",
    "files_read",
    "held",
    "load",
    "own_copy",
    "parsed",
    "save",
    "source_path",
    "to_proto",
]
