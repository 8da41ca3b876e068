"""The documentation: its commands run, its snippets run, its rule sets load, its generated parts are up to date."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from drawn_grids import floats

from rewriter.cli import main
from rewriter.parity.model_inputs import random_inputs
from rewriter.quantize.formats import MXFP4
from rewriter.ruleset import load
from rewriter.ruleset.schema import json_schema

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDE = DOCS / "writing-a-rule.md"
RECOGNISER_GUIDE = DOCS / "writing-a-recogniser.md"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
MODELS = ROOT / "tests" / "models"
EXAMPLE = ROOT / "tests" / "example_package"
LANGUAGES = {"bash", "sh", "python", "yaml", "text", "toml", "diff", "json"}
NO_RUN_AT_MOST = 3
FILES = {
    "model.onnx": "mobius/granitemoehybrid_static_unroll_f32.onnx",
    "moe.onnx": "genai/lfm2_moe_fp32_cpu.onnx",
    "dense.onnx": "mobius/llama_tied_dense_f32.onnx",
    "qmoe.onnx": "genai/gpt_oss_int4_cpu_b32.onnx",
    "exported/model.onnx": "genai/lfm2_moe_fp32_cpu.onnx",
    "exported/vision.onnx": "mobius/llama_tied_dense_f32.onnx",
}
"""What the snippets of the pages find in their folder."""
PACKAGE = {"decoder": "model.onnx", "vision": "vision.onnx"}


@dataclass(frozen=True)
class Block:
    """A fenced block; ``words`` is what follows its language."""

    language: str
    words: tuple[str, ...]
    text: str
    where: str

    @property
    def file(self):
        return next((word for word in self.words if "." in word), "")


def blocks(page):
    found = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if not line.startswith("```"):
            continue
        language, *words = line[3:].split() or [""]
        body = []
        for _, inner in lines:
            if inner.startswith("```"):
                break
            body.append(inner)
        found.append(Block(language, tuple(words), "\n".join(body) + "\n", f"{page.name}:{number}"))
    return found


def commands(block):
    """The commands of a shell block, one list of words each."""
    joined = block.text.replace("\\\n", " ").replace("&&", "\n")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def loose(text):
    """What a machine may not sway: errors, widths and the runtime's version are left out."""
    text = re.sub(r"@\d+\.\d+", "@_", text)
    text = re.sub(r"\d+\.\d+(e[-+]?\d+)?|(?<=\s)0(?=\s)", "_", text)
    return re.sub(r"─+", "─", re.sub(r"[ \t]+", " ", text))


def contains(output, expected, where):
    shown = loose(output)
    for line in filter(None, map(str.strip, loose(expected).splitlines())):
        assert line in shown, f"{where}: the output has no line '{line}':\n{output}"


@functools.cache
def generator():
    sys.path.insert(0, str(DOCS))  # as for a script
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


# The pages as they stand


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    fresh = generator().generated(text)
    assert loose(fresh) == loose(text), f"{page.name} is stale: run python docs/generate.py"


def test_every_part_that_can_be_generated_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"<!-- generated: (\S+) -->", page.read_text())}
    assert shown == set(generator().PARTS)


def section(page, title):
    """What stands under a heading, up to the next of its level."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(title)}$\n(.*?)(?=^\1 |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no section {title}"
    return found[2]


def test_the_catalogue_names_every_rule_and_option():
    for module in sorted((ROOT / "rules").glob("[!_]*.py")):
        spec = importlib.import_module(f"rewriter.rules.{module.stem}")
        text = section(DOCS / "rules.md", module.stem.replace("_", "-"))
        for heading in ("Matched", "Replacement", "Declines when", "Source"):
            assert f"{heading}:" in text, f"{module.stem}: {heading}"
        for option in inspect.signature(spec.rule).parameters:
            assert f"`{option}`" in text, f"{module.stem}: {option}"


def test_the_reference_names_every_rule_set_and_key():
    for path in sorted((ROOT / "rules" / "sets").glob("*.yaml")):
        assert yaml.safe_load(path.read_text())["description"] in section(DOCS / "rule-sets.md", path.stem)
        assert f"(docs/rule-sets.md#{path.stem})" in PAGES[0].read_text()
    schema = json_schema(rules=False)
    reference = (DOCS / "rule-sets.md").read_text()
    for part in (schema, *schema["$defs"].values()):
        for key in part["properties"]:
            assert f"| `{key}` |" in reference, key


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_blocks_say_what_they_are():
    everything = [block for page in PAGES for block in blocks(page)]
    for block in everything:
        assert block.language in LANGUAGES, f"{block.where}: '{block.language}'"
    assert sum("no-run" in block.words for block in everything) <= NO_RUN_AT_MOST


def test_the_gate_finds_its_two_commands_in_the_readme():
    first, second = (block.text for block in blocks(PAGES[0]) if block.language == "bash")
    assert first.startswith("pip install") and "rewriter apply tests/models/" in first
    assert second.startswith("pip install") and second.rstrip().endswith("pytest")


# What they hold, run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which a page's snippets run, one after the other."""
    (tmp_path / "exported").mkdir()
    package = {"model": {name: {"filename": file} for name, file in PACKAGE.items()}}
    (tmp_path / "exported" / "genai_config.json").write_text(json.dumps(package))
    for name, model in FILES.items():
        shutil.copy(MODELS / model, tmp_path / name)
    ir.save(_born(), tmp_path / "born.onnx")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "docs").symlink_to(DOCS)
    model = ir.load(tmp_path / "model.onnx")
    np.savez(tmp_path / "feeds.npz", **random_inputs(model, 0))
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 100, (6, 16)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    return tmp_path


def _born():
    """gpt-oss with experts that lie on a grid of mxfp4."""
    model = ir.load(MODELS / "genai/gpt_oss_fp32_cpu.onnx")
    for name, value in model.graph.initializers.items():
        if ".experts." in name and len(value.shape) == 3:
            experts, n, k = value.shape.numpy()
            stack = [floats(n, k, MXFP4, dtype=np.float32, seed=expert)[0] / 16 for expert in range(experts)]
            value.const_value = ir.tensor(np.stack(stack), name=name)
    return model


@pytest.mark.parametrize("page", [p for p in PAGES if p not in (GUIDE, RECOGNISER_GUIDE)], ids=lambda page: page.name)
def test_snippets_run(page, folder):
    output, names = "", {"__name__": "__main__"}
    for block in blocks(page):
        if "no-run" in block.words:
            continue
        if block.language == "yaml":
            source = Path(block.file) if block.file else yaml.safe_load(block.text)
            if block.file:
                source.write_text(block.text)
            assert load(source).phases, block.where
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, block.where, "exec"), names)
            output = out.getvalue()
        elif block.language in ("sh", "bash"):
            output = "".join(run_here(words, block) for words in commands(block))
        elif "output" in block.words:
            contains(output, block.text, block.where)


def run_here(words, block):
    if words[:2] == ["python", "docs/generate.py"]:
        assert set(words[2:]) <= {"--check"}
        return ""  # what test_generated_parts_are_up_to_date does
    if block.language == "bash" and words[0] in ("pip", "pytest"):
        return ""  # what the gate does
    words = words[3:] if words[:3] == ["python", "-m", "rewriter"] else words[1:] if words[0] == "rewriter" else None
    assert words is not None, f"{block.where}: nothing runs this"
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(errors):
        code = main(words)
    wanted = 1 if "exit-1" in block.words else 0
    assert code == wanted, f"{block.where}: exit code {code}\n{errors.getvalue()}"
    return out.getvalue() + errors.getvalue()


# The guide, followed step by step


def command(words, folder, site, log):
    """Runs one command of the guide in a process of its own, as its installed entry point would."""
    with Path(log).open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith(("PYTEST", "REWRITER"))]:
        del os.environ[name]
    os.environ["COLUMNS"] = "110"
    sys.path[:0] = [site, folder]
    sys.dont_write_bytecode = True  # the files change faster than their times tell
    importlib.invalidate_caches()
    sys.argv = words
    match words:
        case ["python", "-c", text]:
            exec(compile(text, "guide", "exec"), {"__name__": "__main__"})
            code = 0
        case ["python", file]:
            runpy.run_path(file, run_name="__main__")
            code = 0
        case ["rewriter", *arguments]:
            code = main(arguments)
        case ["pytest", *arguments]:
            code = pytest.main(arguments)
    sys.stdout.flush()
    sys.exit(int(code))


class Reader:
    """Someone with an empty folder who does what the guide says."""

    def __init__(self, folder):
        self.folder = folder
        self.site = folder.parent / "site"
        self.output = ""
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["rewriter.api", "rewriter.cli.console", "rewriter.testing", "pytest"])

    def write(self, block):
        """A second block of the same file goes on with it."""
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        before = f"{path.read_text()}\n\n" if path.exists() else ""
        path.write_text(before + block.text)

    def run(self, words, code=0):
        if words[0] == "pip":
            assert words == ["pip", "install", "-e", "."]
            self.install()
            return
        log = self.folder.parent / "log"
        process = self.processes.Process(target=command, args=(words, str(self.folder), str(self.site), str(log)))
        process.start()
        process.join(timeout=120)
        self.output = log.read_text()
        assert process.exitcode == code, self.output

    def install(self):
        """What an editable install leaves behind, without a network: metadata, and the folder on the path."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        info = self.site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def break_and_test(self, block):
        """Makes the change, runs the tests, which must fail, and takes the change back."""
        path = self.folder / block.file
        before = path.read_text()
        old, new = (
            "\n".join(line[1:] for line in block.text.splitlines() if line.startswith(sign)) for sign in ("-", "+")
        )
        assert before.count(old) == 1, block.where
        path.write_text(before.replace(old, new))
        tests = " ".join(word for word in block.words if word != block.file) or "not check_rule"
        self.run(["pytest", "--hypothesis-profile=ci", "-k", tests], code=1)  # the same models each time
        path.write_text(before)


def followed(guide, folder):
    """Does what a guide says, in an empty folder."""
    folder.mkdir()
    reader = Reader(folder)
    for block in blocks(guide):
        if block.language == "sh":
            for words in commands(block):
                reader.run(words)
        elif block.language == "diff":
            reader.break_and_test(block)
        elif block.file:
            reader.write(block)
        elif block.language == "python":
            reader.run(["python", "-c", block.text])
        else:
            assert "output" in block.words, block.where
            contains(reader.output, block.text, block.where)


def test_the_guide_ends_in_a_recogniser_that_works(tmp_path):
    followed(RECOGNISER_GUIDE, tmp_path / "empty")


def test_the_guide_ends_in_a_rule_that_works(tmp_path):
    folder = tmp_path / "empty"
    followed(GUIDE, folder)
    for path in sorted(EXAMPLE.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".toml", ".yaml"):
            written = (folder / path.relative_to(EXAMPLE)).read_text()
            assert [*filter(None, written.splitlines())] == [*filter(None, path.read_text().splitlines())], path.name
