"""The prober's command line."""

from __future__ import annotations

import argparse
import collections
import datetime
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from probe import answers, apart, forms, sweep

DESCRIPTION = """Measures what ONNX Runtime computes with each form of MoE, QMoE, MatMulNBits and GatherBlockQuantized,
and writes one file of answers, which belongs into benchmarks/prober/measured."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="prober", description=DESCRIPTION)
    parser.add_argument("--provider", choices=apart.PROVIDERS, default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder of the file of answers, where other forms stay"
    )
    parser.add_argument("--only", metavar="FORM", nargs="*", help="settings that a form must have, as QMoE bits=4,8")
    parser.add_argument("--forms", type=Path, metavar="FILE", help="measure these forms, one a line, not the sweep's")
    parser.add_argument("--jobs", type=int, default=1, help="forms at a time")
    parser.add_argument("--hardware", help="what it runs on; else asked of the machine")
    parser.add_argument("--list", action="store_true", help="print the forms and stop")
    given = parser.parse_args()
    every = sweep.forms() if given.forms is None else _read(given.forms)
    wanted = [form for form in every if set(given.only or ()) <= set(forms.text_of(form).split())]
    if given.list:
        print(*map(forms.text_of, wanted), sep="\n")
        return 0
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    if given.provider == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    if apart.PROVIDERS[given.provider] not in ort.get_available_providers():
        print(f"this onnxruntime {ort.__version__} has no {apart.PROVIDERS[given.provider]}", file=sys.stderr)
        return 2

    def told(number: int, form: forms.Form, answer: apart.Answer) -> None:
        if given.only is not None or number % 100 == 0 or "prober" in answer:
            print(f"{number + 1}/{len(wanted)} {forms.text_of(form)}: {answer}", flush=True)

    found = apart.answers(wanted, given.provider, given.jobs, told)
    if any("prober" in answer for answer in found):
        return 1
    hardware = given.hardware or _hardware(given.provider)
    made = tuple(_answer(form, answer) for form, answer in zip(wanted, found, strict=True))
    today = datetime.date.today().isoformat()
    own = answers.Answers(given.provider, ort.__version__, hardware, today, made)
    print(dict(collections.Counter(answer.verdict(given.provider) for answer in made)))
    print(answers.write(given.out, own))
    return 0


def _read(path: Path) -> list[forms.Form]:
    return [forms.form_of(line) for line in path.read_text().splitlines() if line.strip()]


def _answer(form: forms.Form, found: apart.Answer) -> answers.Answer:
    if "error" in found:
        return answers.Answer(form, float(str(found["error"])))
    kind = next(kind for kind in ("load", "run", "crash") if kind in found)
    tokens = found.get("tokens", list(apart.TOKENS))
    some = f" [{', '.join(map(str, tokens))} tokens]" if list(tokens) != list(apart.TOKENS) else ""
    return answers.Answer(form, None, f"{kind}:{some} {_short(str(found[kind]))}")


def _short(message: str) -> str:
    """Drops where in the source it was said, and what differs from form to form."""
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", message)
    message = re.sub(r"/onnxruntime_src/\S*/(\S+?):\d+ [^ ]+( [^(]*\(.*?\))?", r"\1", message)
    message = re.sub(r"0x[0-9a-f]+|\d{3,}", "N", message)
    return message[:160].strip()


def _hardware(provider: str) -> str:
    if provider == "cuda" and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    cores = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", cores.read_text()) if cores.exists() else None
    return named.group(1).strip() if named else platform.machine()
