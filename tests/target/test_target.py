"""What a target says that it runs."""

from __future__ import annotations

from importlib import metadata

import pytest

from rewriter.errors import TargetError
from rewriter.operators.form import ExpertForm
from rewriter.report.provenance import versions
from rewriter.target import KERNELS, LINEARS, LOOKUPS, PROVIDERS, Target
from rewriter.target import target as target_module


@pytest.mark.parametrize("text", ["cpu@1.28", "cuda:sm80@1.31", "cuda:sm90@1.27", "webgpu@1.30", "dml@1.24"])
def test_a_target_reads_as_it_is_written(text):
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu:sm80", "unknown architecture 'sm80'"),
        ("cuda:sm70", "unknown architecture 'sm70'"),
        ("cdua", "did you mean 'cuda'"),
        ("cpu@1.22", "before 1.23"),
        ("cpu@99", r"a version is MAJOR\.MINOR, as cpu@1\.32"),
        ("CPU", "did you mean 'cpu'"),
        ("CUDA:sm80@1.32", "did you mean 'cuda'"),
        ("cpu 1.28", r"is not PROVIDER\[:sm80\|sm90\]\[@VERSION\]"),
    ],
)
def test_what_is_no_target(text, message):
    with pytest.raises(TargetError, match=message):
        Target.parse(text)


def test_the_installed_version_is_that_of_the_module_that_is_imported(monkeypatch):
    """Several distributions install a module of that name: with two of them, their own versions tell nothing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", "1.29.3")
    target_module._installed.cache_clear()
    try:
        assert Target.parse("auto").version == Target.parse("cuda").version == (1, 29)
    finally:
        target_module._installed.cache_clear()


@pytest.mark.parametrize(
    "names",
    [("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-directml",), ("onnxruntime-qnn",), ("onnxruntime-openvino",)],
    ids="+".join,
)
def test_the_version_is_the_imported_modules_whatever_distributions_say(names, tmp_path, monkeypatch):
    """With both wheels, or another one, a distribution's version is not that of the code that runs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in names:
        folder = tmp_path / f"{name.replace('-', '_')}-1.23.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.23.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {metadata.version(name) for name in names} == {"1.23.9"}
    target_module._installed.cache_clear()
    assert Target.parse("auto").version == tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    assert versions()["onnxruntime"] == onnxruntime.__version__


def test_auto_asks_the_installed_runtime():
    onnxruntime = pytest.importorskip("onnxruntime")
    target = Target.parse("auto")
    assert target.installed and onnxruntime.__version__.startswith(f"{target.version[0]}.{target.version[1]}.")
    for attribute in ("k", "weights_prepacked", "accuracy_level", "colour"):
        assert target.has("QMoE", attribute) == (Target.parse("cpu").has("QMoE", attribute) and attribute != "colour")


@pytest.mark.parametrize(
    ("text", "attributes", "router_weights"),
    [
        ("cpu@1.23", set(), False),
        ("cpu@1.25", set(), True),
        ("cpu@1.27", {"quant_type"}, True),
        ("cpu@1.28", {"quant_type", "weights_prepacked"}, True),
        ("cpu@1.31", {"quant_type", "weights_prepacked", "accuracy_level", "fc1_expert_weight_bits"}, True),
        ("webgpu@1.31", {"quant_type", "weights_prepacked", "accuracy_level", "fc1_expert_weight_bits"}, False),
    ],
)
def test_the_schema_by_version(text, attributes, router_weights):
    known = {"quant_type", "weights_prepacked", "accuracy_level", "fc1_expert_weight_bits"}
    target = Target.parse(text)
    assert {name for name in known if target.has("QMoE", name)} == attributes
    form = ExpertForm(activation="swiglu", fusion=1)
    assert isinstance(target.runs("QMoE", form, "FLOAT16", weighted=True), tuple) == router_weights


def layouts_of(text):
    """The layouts of weights that QMoE reads, the preferred first."""
    return tuple(dict.fromkeys(layout for kernel in Target.parse(text).kernels("QMoE") for layout in kernel.layouts))


def test_layouts():
    assert layouts_of("cpu@1.31") == ("raw",)
    assert layouts_of("cpu@1.32") == ("raw", "cutlass-sm80")
    assert layouts_of("cuda:sm90@1.28") == ("cutlass-sm80", "raw")
    assert layouts_of("cuda:sm90@1.27") == ("cutlass-sm90",)
    assert layouts_of("cuda@1.27") == ()
    assert layouts_of("dml") == ()


def test_layouts_of_matmul_nbits():
    refusal = Target.parse("cuda@1.31").linear.refusal
    assert refusal("FLOAT16", 4, 32, layout="cutlass-sm80") is None
    assert "does not read cutlass-sm90" in refusal("FLOAT16", 4, 32, layout="cutlass-sm90")
    assert "blocks of 32 without zero points" in refusal("FLOAT16", 4, 64, layout="cutlass-sm80")
    assert "blocks of 32 without zero points" in refusal("FLOAT16", 4, 32, symmetric=False, layout="cutlass-sm80")
    assert "does not read" in Target.parse("cuda@1.27").linear.refusal("FLOAT16", 4, 32, layout="cutlass-sm80")


def test_rows_are_in_the_order_of_versions():
    kernels = [rows for series in KERNELS.values() for rows in series]
    for rows in (*kernels, *LINEARS.values(), *LOOKUPS.values()):
        assert [row.since for row in rows] == sorted({row.since for row in rows})


def test_every_provider_has_linears_and_lookups():
    for provider in PROVIDERS:
        for version in ("1.23", "1.31"):
            target = Target.parse(f"{provider}@{version}")
            assert target.linear.refusal("FLOAT16", 4) is None
            assert target.lookup.refusal("FLOAT16", 64, 8, 32, symmetric=False) is None


@pytest.mark.parametrize(
    ("text", "dtype", "runs"),
    [("cpu@1.23", "FLOAT", False), ("cpu@1.24", "FLOAT", True), ("cpu@1.27", "FLOAT16", False)],
)
def test_linears_of_two_bits(text, dtype, runs):
    assert (Target.parse(text).linear.refusal(dtype, 2) is None) == runs


@pytest.mark.parametrize(
    ("text", "bits", "block", "level", "rounds"),
    [
        ("cpu@1.31", 8, 32, 0, True),
        ("cpu@1.30", 8, 32, 0, False),
        ("cpu@1.31", 8, 0, 0, False),
        ("cpu@1.31", 4, 32, 4, True),
    ],
)
def test_what_rounds_activations(text, bits, block, level, rounds):
    assert Target.parse(text).kernels("QMoE")[0].rounds_activations(bits, block, level) == rounds


def test_attributes_stored_in_float32_are_the_fixed_constants():
    (kernel,) = Target.parse("cuda:sm80@1.27").kernels("QMoE")
    form = ExpertForm(activation="swiglu", fusion=1, alpha=1.7020000219345093, beta=1.0, limit=7.0)
    assert kernel.refusal(form, "FLOAT16") is None
    assert "fixed" in kernel.refusal(ExpertForm(activation="swiglu", fusion=1), "FLOAT16")
