"""The report as a page: well-formed, self-contained, escaped, complete, and at home in a browser."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rewriter
from rewriter.cli import main
from rewriter.html import coverage_page, fragment, page
from rewriter.html.heat import LEVELS, Scale, grid, heat_maps
from rewriter.report import (
    Application,
    Comparison,
    Decline,
    Metrics,
    PlanLine,
    Proof,
    Report,
    Size,
    UsedPhase,
    UsedRule,
    UsedRuleSet,
    Weight,
)
from rewriter.report.coverage import BlockCoverage, Coverage
from rewriter.text import natural

GRANITE = Path(__file__).parent / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert(1)</script>\"'&lt;{{ 7 * 7 }}"


def weight(role="expert.down", layer=0, expert=0, error=0.08, name=None):
    return Weight(
        name=name or f"w.{role}.{layer}.{expert}", node="n", role=role, layer=layer, expert=expert, shape=(64, 32),
        algorithm="rtn", bits=4, block_size=32, symmetric=True, bytes_before=4096, bytes_after=640, relative_rms=error,
    )  # fmt: skip


def full(name="name", count=1):
    """A report in which every table has a row, and every name is ``name``."""
    return Report(
        rule_set=name,
        target=name,
        applications=(Application(name, name, 1, name, (name,), (name,), 0, (name,)),) * count,
        declines=(Decline(name, name, "n", name, name, remedy=name),) * count,
        proofs=(
            Proof(name, name, 1e-7, 1e-5, name, because=name, experts=8),
            Proof(name, "", 0, 0, name, skipped=name),
        ),
        weights=(weight(name=name), weight(role=name, expert=None, name=name)),
        sweeps={name: 2},
        bytes_before=8192,
        bytes_after=1280,
        parity=Comparison(name, 0, {name: Metrics(0.1, 1.0, (0,), 0.99, 20.0, 0.9, 0.01)}, name, (name,)),
        model=name,
        rules=UsedRuleSet(
            name, name, (UsedPhase(name, (UsedRule(name, {name: name}),)),), (PlanLine(name, name, {name: name}),)
        ),
        sizes=(Size("expert", 4096, 640), Size(name, 4096, 640)),
    )


def large():
    weights = [weight(role, layer, e, 0.08 + e / 1e4) for role in ("expert.down", "expert.gate_up")
               for layer in range(30) for e in range(128)]  # fmt: skip
    weights += [weight(f"attention.{role}", layer, None) for role in "qkvo" for layer in range(30)]
    return dataclasses.replace(full(count=7800), weights=tuple(weights))


class Strict(HTMLParser):
    """Fails on a tag that is not closed, or closes nothing; keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


REPORTS = {
    "nothing": Report("unstack", "cpu@1.31"),
    "full": full(),
    "hostile": full(HOSTILE),
    "large": large(),
    "not finite": dataclasses.replace(
        full(), weights=(weight(error=float("nan")), weight(error=float("inf"), expert=1))
    ),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("write", [page, fragment])
def test_it_is_well_formed_and_needs_nothing_else(report, write):
    text = write(report)
    found = Strict(text)
    assert not {"script", "img", "iframe", "object", "base"} & set(found.tags)
    assert not [(key, value) for key, value in found.attributes if key.startswith("on")]
    assert not [value for key, value in found.attributes if key in ("src", "href") and not value.startswith("data:")]
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(text.encode()) < 2_000_000


def test_cards_say_what_is_good():
    report = full()
    compared = dataclasses.replace(report.parity, failures=(), seed=0)
    text = Strict(page(dataclasses.replace(report, parity=compared))).text
    assert "usual: 8% in 4 bits, 0.5% in 8" in text
    assert "100%: nothing changed" in text or "20 dB: an error of 10%" in text
    assert "random inputs show mistakes, not quality" in text


def test_layers_come_in_their_order():
    names = ["layers.10.w", "layers.2.w", "layers.1.w", "lm_head"]
    assert sorted(names, key=natural) == ["layers.1.w", "layers.2.w", "layers.10.w", "lm_head"]


def test_hostile_names_stay_text():
    found = Strict(page(full(HOSTILE)))
    assert found.text.count(HOSTILE) >= 12
    assert "49" not in found.text.split()


def test_a_page_has_one_head_and_a_fragment_has_none():
    assert page(full()).startswith("<!doctype html>")
    assert {"html", "head", "body"} <= set(Strict(page(full())).tags)
    assert not {"html", "head", "body"} & set(Strict(fragment(full())).tags)
    style = fragment(full()).partition("<style>")[2].partition("</style>")[0]
    selectors = [one.strip() for block in re.findall(r"([^{}]+)\{", style) for one in block.split(",  ")]
    own = ".rewriter-report:is(*, #rewriter)"
    assert all(selector.rpartition("*/")[2].strip().startswith((own, "@media")) for selector in selectors)


def test_a_notebooks_style_of_tables_does_not_reach_ours():
    """JupyterLab lays every table of an output out with columns of one width, so that long names overlap."""
    style = fragment(full())
    reset = style.index("all: revert")
    assert re.search(r"#rewriter\) :is\([^)]*\btable\b[^)]*\btd\b[^)]*\) \{ all: revert", style)
    assert reset < style.index("border-collapse")  # what is ours comes after what takes the notebook's away


def test_every_figure_is_there():
    text = Strict(page(full())).text
    for words in ("6.4x smaller", "8.19 kB → 1.28 kB", "1e-07 of 1e-05 allowed", "8 experts", "at fault: name", "8.00%",
                  "20.0", "To change it: name", "90.0%", "0.990000", "64 \u00d7 32", "name: name"):  # fmt: skip
        assert words in text, words


def test_nothing_is_said_as_nothing():
    text = Strict(page(Report("unstack", "cpu@1.31"))).text
    for words in ("Nothing fired", "Nothing declined", "No weight has been quantized", "have not been compared"):
        assert words in text


def test_long_tables_are_cut():
    declines = tuple(Decline("r", "p", f"n{i}", f"reason {i}", "") for i in range(500))
    assert "and 440 more reasons" in Strict(page(dataclasses.replace(full(), declines=declines))).text


# heat maps


def test_every_expert_has_a_cell():
    maps = heat_maps([weight(role, layer, e) for role in ("a", "b") for layer in (0, 2) for e in range(5)])
    assert [(m.role, m.count, len(m.rows), [len(row.cells) for row in m.rows]) for m in maps] == [
        ("a", 10, 2, [5, 5]),
        ("b", 10, 2, [5, 5]),
    ]
    assert [row.label for row in maps[0].rows] == ["0", "2"]


def test_of_two_weights_in_one_place_the_worse_is_shown():
    (found,) = heat_maps([weight(error=0.1), weight(error=0.3), weight(error=0.2)])
    assert found.rows[0].cells[0].title == "layer 0, expert 0: 30.00%"
    assert found.count == 3


def test_layers_by_roles():
    found = grid([weight("q", 0, None), weight("o", 1, None, 0.16), weight("lm_head", None, None), weight("e", 0, 1)])
    assert found.roles == ("o", "q")
    assert found.rows == (("0", (None, (0, 0.08))), ("1", ((LEVELS - 1, 0.16), None)))
    assert grid([weight()]) is None


def test_noise_looks_like_noise():
    scale = Scale.of([0.100, 0.101])
    assert scale.level(0.100) in (3, 4) and scale.level(0.101) in (3, 4)
    wide = Scale.of([0.1, 0.2])
    assert (wide.level(0.1), wide.level(0.2)) == (0, LEVELS - 1)
    assert Scale.of([0.0]).level(0.0) == 0
    assert Scale.of([float("nan")]).level(float("nan")) == LEVELS - 1


# real runs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of a real run, beside the model."""
    out = tmp_path_factory.mktemp("html") / "out"
    assert main(["apply", str(GRANITE), "-o", str(out), "--html", str(out / "report.html"), "-q"]) == 0
    return out / "report.html"


def test_a_real_run(written):
    text = Strict(written.read_text(encoding="utf-8")).text
    for words in ("moe-int4 on", "granitemoehybrid", "matmul-to-matmul-nbits", "excluded by the plan (role router)",
                  "expert.gate_up: error, layer by expert", "same best token in logits", "mse-search"):  # fmt: skip
        assert words in text, words
    assert written.read_text().count("<rect") == 16


def test_a_result_shows_itself_in_a_notebook():
    shown = rewriter.apply(GRANITE, rules="unstack")._repr_html_()
    assert "unstack" in Strict(shown).text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html", "out.txt"], "a page is a file as report.html"),
        (["--report", "out.html"], "the report is JSON; --html out.html writes a page"),
        (["--html", "taken.html"], "exists and is no report"),
        (["--html", "nowhere/out.html"], "there is no directory"),
    ],
)
def test_a_page_goes_where_a_page_may(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken.html").write_text("<html>mine</html>")
    assert main(["apply", str(GRANITE), "-o", "out", "--no-check", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_page_may_be_written_again(tmp_path):
    target = tmp_path / "page.html"
    for _ in range(2):
        arguments = ["-r", "unstack", "--overwrite", "--no-check", "-q", "--html", str(target)]
        assert main(["apply", str(GRANITE), "-o", str(tmp_path / "out"), *arguments]) == 0


def test_what_stays_float_is_named_with_the_reason():
    model = GRANITE.parents[1] / "genai" / "gemma4_moe_fp32_cpu_b32.onnx"
    shown = page(rewriter.apply(model, prover=lambda rewrite, run: None).report)
    declined = shown[shown.index("What declined, and why") :]
    assert declined.index("has no kernel") < declined.index("excluded by the plan")
    left = declined[declined.index("Largest weights left in float") :]
    assert re.search(r"experts.gate_up_proj.weight</td><td>expert</td>.*65.5 kB.*has no kernel", left)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_in_a_browser_without_a_word_on_the_console(written, tmp_path, dark):
    shot = tmp_path / "shot.png"
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    told = ["--enable-logging=stderr", "--v=0", f"--screenshot={shot}", "--window-size=1080,1200"]
    done = subprocess.run(
        [BROWSER, *quiet, *told, *theme, written.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 20_000


def test_layers_are_listed_by_what_their_outputs_lose():
    weights = [
        dataclasses.replace(weight(layer=n % 3, expert=n), output_rms=0.1 * (n % 3) + n / 1000) for n in range(9)
    ]
    text = Strict(page(Report("r", "cpu", weights=(*weights, weight(role="lm_head", layer=None, expert=None))))).text
    start = text.index("Output errors, worst layers first")
    assert re.search(
        r"layer role count mean worst worst weight 2 expert.down 3 20.50% 20.80% w.expert.down.2.8"
        r" 1 expert.down 3 10.40% 10.70% w.expert.down.1.7 0 ",
        text[start:],
    )
    assert "Output errors" not in page(large())


COVERAGES = {
    "nothing": Coverage("", 0, 0, ()),
    "full": Coverage("m.onnx", 5000, 7, (BlockCoverage(0, 64, (0, 3, 4000, 63)), BlockCoverage(None, 64, (9, 9)))),
    "hostile": Coverage(HOSTILE, 9, 1, (BlockCoverage(0, 4, (0,)),)),
    "large": Coverage("m", 10**6, 99, tuple(BlockCoverage(n, 64, tuple(range(256))) for n in range(60))),
}


@pytest.mark.parametrize("coverage", COVERAGES.values(), ids=COVERAGES)
def test_a_page_shows_what_experts_saw(coverage):
    text = coverage_page(coverage)
    found = Strict(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "img", "iframe"} & set(found.tags)
    assert len(text.encode()) < 2_000_000
    assert found.tags.count("rect") == sum(len(block.counts) for block in coverage.blocks)
    assert (HOSTILE in found.text) == (coverage.model == HOSTILE)
    if coverage is COVERAGES["full"]:
        assert "layer 0, expert 2: 4,000 tokens" in found.text
        assert "0 4 0 63 4,000 1 3 0 (0), 1 (3), 3 (63), 2 (4,000)" in found.text
        levels = re.findall(r'class="h(\d)"><title>layer 0', text)
        assert levels[0] == "0" < levels[1] < levels[3] < levels[2] == "7"
