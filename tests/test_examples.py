"""The scripts in examples/ do what they say, where the packages that they use are installed."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlencode

import onnx
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from rewriter.cli import main

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "models"


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(folder, model, kind):
    """A folder as GenAI's builder writes it: a model, its configuration, and a tokenizer of bytes."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes((MODELS / model).read_bytes())
    names = [value.name for value in onnx.load(MODELS / model).graph.input]
    caches = {f"past_{k}_names": f"past_key_values.%d.{k}" for k in ("key", "value")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "hidden_size": 64,
        "head_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": sum(bool(re.fullmatch(r"past_key_values\.\d+\.key", name)) for name in names),
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names} | caches,
        "outputs": {"logits": "logits"} | {f"present_{k}_names": f"present.%d.{k}" for k in ("key", "value")},
    }
    ids = {"bos_token_id": 1, "eos_token_id": [511], "pad_token_id": 0, "vocab_size": 512, "context_length": 64}
    search = {"max_length": 32, "past_present_share_buffer": True}
    config = {"model": {"type": kind, **ids, "decoder": decoder}, "search": search}
    (folder / "genai_config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({**{c: i for i, c in enumerate(alphabet)}, **{f"<{i}>": i for i in range(256, 512)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


@pytest.mark.parametrize(
    ("model", "kind", "operator"),
    [
        ("genai/llama_tied_fp32_cpu.onnx", "llama", "MatMulNBits"),
        ("genai/gpt_oss_fp32_cpu.onnx", "gptoss", "QMoE"),
    ],
)
def test_genai_generates_from_a_folder_that_was_rewritten(tmp_path, model, kind, operator):
    pytest.importorskip("onnxruntime_genai")
    folder = package(tmp_path / "exported", model, kind)
    options = ["--set", "quantization.default.bits=8", "--set", "rounded_activations=true"]
    assert main(["apply", str(folder), "-o", str(tmp_path / "int8"), *options]) == 0
    assert operator in {node.op_type for node in onnx.load(tmp_path / "int8" / "model.onnx").graph.node}
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "int8").iterdir()}
    run = example("generate_genai").generate
    before, after = (run(str(path), "abc", 12) for path in (folder, tmp_path / "int8"))
    assert before.startswith("abc") and len(before) > 3
    assert after[:4] == before[:4], "the first token of an 8-bit model is the float model's"


def test_olive_runs_the_rewriter_as_a_pass(tmp_path):
    pytest.importorskip("olive")
    source, output = MODELS / "genai/gpt_oss_fp32_cpu.onnx", tmp_path / "int4"
    subprocess.run([sys.executable, ROOT / "examples" / "olive_pass.py", source, output], check=True)
    assert "QMoE" in {node.op_type for node in onnx.load(output / "model.onnx").graph.node}


NODE_MODULES = ROOT / "node_modules"
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader"]


class Site(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the page shows."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}
    shown: queue.Queue[str] = queue.Queue()

    def do_POST(self):
        self.shown.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def in_the_browser(folder, **asked):
    """What the example's page shows at last, in Chromium on a GPU of software."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = f"http://127.0.0.1:{server.server_port}/page.html?{urlencode(asked)}"
    options = ["--headless=new", "--no-sandbox", f"--user-data-dir={folder / 'profile'}", *SOFTWARE_GPU, page]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    browser = subprocess.Popen([shutil.which("chromium"), *options], **quiet)
    try:
        return Site.shown.get(timeout=120)
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()


@pytest.mark.skipif(
    not shutil.which("chromium") or not (NODE_MODULES / "@huggingface" / "transformers").exists(),
    reason="needs Chromium, and transformers.js: npm install --ignore-scripts @huggingface/transformers",
)
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("mobius/llama_tied_dense_f32.onnx", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}),
        (
            "mobius/qwen3_moe_dense_experts_f32.onnx",
            {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
        ),
    ],
)
def test_transformers_js_generates_on_webgpu(tmp_path, model, kind):
    site = package(tmp_path / "site", model, "llama")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (site / "config.json").write_text(
        json.dumps(kind | sizes | {"num_hidden_layers": 2, "vocab_size": 512, "eos_token_id": 511})
    )
    exported = onnx.load(MODELS / model)
    for value in (*exported.graph.input, *exported.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "batch":
                size.dim_param = "batch_size"  # as transformers.js knows it
    onnx.save(exported, tmp_path / "exported.onnx")
    to = ["-o", str(site / "onnx" / "model_int8.onnx"), "--data-name", "model_int8.onnx_data", "--target", "webgpu"]
    assert (
        main(["apply", str(tmp_path / "exported.onnx"), *to, "--no-check", "--set", "quantization.default.bits=8"]) == 0
    )
    shutil.copy(tmp_path / "exported.onnx", site / "onnx" / "model.onnx")
    page = (ROOT / "examples" / "transformers_js.html").read_text()
    tell = 'const tell = () => fetch("/", {method: "POST", body: out.textContent});'
    tell += "new MutationObserver(tell).observe(out, {childList: true})"
    (tmp_path / "page.html").write_text(f'{page}<script type="module">{tell}</script>')
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    before = in_the_browser(tmp_path, model="site", prompt="abc", dtype="fp32")
    after = in_the_browser(tmp_path, model="site", prompt="abc", dtype="int8")
    assert before.startswith("abc") and len(before) > 3
    assert after[:4] == before[:4], "the first token of an 8-bit model is the float model's"
