"""llama.cpp's imatrix files, written here as it writes them, reach each weight by role, layer and expert."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

import rewriter
from rewriter.cli import main
from rewriter.errors import UsageError
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.importance import Importance
from rewriter.quantize.llama_imatrix import tensor_names
from rewriter.roles import ROLES

MODELS = Path(__file__).parents[1] / "models"
LAYERS = 2


def sums(widths, experts, seed=0):
    """Sums of squares [E, K] and counts [E] by tensor, as a run gives them."""
    rng = np.random.default_rng(seed)
    found = {"output.weight": (rng.random((1, widths["hidden"])) * 50, np.array([50]))}
    for layer in range(LAYERS):
        hidden, stack = rng.random((1, widths["hidden"])) * 50, rng.random((experts, widths["hidden"])) * 9
        for name in ("attn_q", "attn_k", "attn_v"):
            found[f"blk.{layer}.{name}.weight"] = (hidden, np.array([50]))
        found[f"blk.{layer}.attn_output.weight"] = (rng.random((1, widths["heads"])) * 50, np.array([50]))
        counts = np.arange(experts)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            found[f"blk.{layer}.{name}.weight"] = (stack * counts[:, None], counts)
        down = rng.random((experts, widths["inter"])) * counts[:, None]
        found[f"blk.{layer}.ffn_down_exps.weight"] = (down, counts)
    return found


def write_gguf(path, entries):
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    for name, (values, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path, entries, calls=3):
    data = struct.pack("<i", len(entries))
    for name, (values, counts) in entries.items():
        means = values / np.maximum(counts, 1)[:, None]
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, means.size)
        data += (means * calls).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", calls, 8) + b"some.txt")
    return path


WRITERS = {"gguf": write_gguf, "dat": write_dat}


def importance_of(model, imatrix):
    """By role, layer and expert, what each quantizer was given."""
    seen = {}

    def spy(weight, context):
        seen[context.role, context.layer, context.expert] = context.importance
        return ALGORITHMS["rtn"](weight, context)

    result = rewriter.apply(model, "rtn", quantizer=spy, imatrix=imatrix, overrides={"parity.local": "none"})
    for value in result.ir_model.graph.initializers.values():
        value.const_value.numpy()
    return seen


@pytest.mark.parametrize("kind", WRITERS)
def test_each_weight_gets_the_means_of_its_role_layer_and_expert(kind, tmp_path):
    model = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
    plain = importance_of(model, None)
    assert set(plain.values()) == {None}
    entries = sums({"hidden": 64, "heads": 64, "inter": 32}, 4)
    seen = importance_of(model, WRITERS[kind](tmp_path / f"imatrix.{kind}", entries))
    compared = set()
    for (role, layer, expert), given in seen.items():
        names = [name for name in tensor_names(role, layer) if name in entries]
        if not names:
            assert given is None, role
            continue
        values, counts = entries[names[0]]
        index = expert or 0
        if counts[index]:
            np.testing.assert_allclose(given, values[index] / counts[index], rtol=1e-5)
        elif kind == "gguf":  # an expert that saw nothing: what the others have
            np.testing.assert_allclose(given, values.sum(axis=0) / counts.sum(), rtol=1e-5)
        compared.add(role)
    assert compared >= {"lm_head", "attention.o", "expert.down"}
    assert compared & {"expert.gate_up", "expert.gate"} and compared & {"attention.qkv", "attention.q"}


def test_names_of_every_role_are_those_of_its_layer():
    for role in ROLES:
        names = tensor_names(role, 7)
        assert all(name.startswith("blk.7.") for name in names) or role == "lm_head"
        assert names or role in ("embedding", "expert"), role
    assert tensor_names("expert.down", 3) == ("blk.3.ffn_down_exps.weight",)
    assert tensor_names("attention.o", None) == ()


def test_another_model_is_refused(tmp_path):
    model = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
    entries = sums({"hidden": 64, "heads": 64, "inter": 32}, 4)
    more = {"blk.2.attn_q.weight": entries["blk.0.attn_q.weight"]}
    with pytest.raises(UsageError, match="of a model of 3 blocks; this one has 2 layers"):
        importance_of(model, write_gguf(tmp_path / "a.gguf", entries | more))
    wide = sums({"hidden": 96, "heads": 64, "inter": 32}, 4)
    with pytest.raises(UsageError, match="is for 96 input features; the weight has 64"):
        importance_of(model, write_gguf(tmp_path / "b.gguf", wide))
    strange = {"blk.1.ffn_gate_inp.weight": (np.ones((1, 64)), np.array([2]))}
    with pytest.raises(UsageError, match="of no weight that is quantized"):
        importance_of(model, write_gguf(tmp_path / "c.gguf", strange))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.gguf", b"GGUF"),
        ("a.gguf", b"GGUF" + bytes(40)),
        ("a.dat", b""),
        ("a.dat", b"\x01\x00\x00\x00\xff\xff\xff\x7f"),
        ("a.dat", struct.pack("<ii", 1, 2) + b"xy" + struct.pack("<ii", 1, 1 << 30)),
        ("a.dat", struct.pack("<i", 0)),
    ],
)
def test_a_broken_file_is_one_clear_line(name, data, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match="give "):
        Importance.read(tmp_path / name)
    model = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
    assert main(["apply", str(model), "-o", str(tmp_path / "o"), "--imatrix", str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3


@pytest.mark.parametrize("name", ["a.dat", "a.gguf", "a.npz"])
def test_a_missing_file_is_named_once(name, tmp_path):
    with pytest.raises(UsageError) as raised:
        Importance.read(tmp_path / name)
    assert str(raised.value).startswith(
        f"importance file '{tmp_path / name}' cannot be read (No such file or directory); "
    )
