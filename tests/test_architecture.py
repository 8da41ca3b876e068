"""The floors of the house: imports point down, rules know only what they are offered, and one module prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: {"memory", "process", "text"},
    1: {"errors"},
    2: {"graph", "tensors"},
    3: {"quantize", "report"},
    4: {"html", "operators", "ruleset"},
    5: {"experts", "facts", "io", "layout", "target"},  # experts and layout: names kept for one release
    6: {"roles"},
    7: {"inspection", "rule"},
    8: {"emit", "engine"},
    9: {"parity"},
    10: {"calibration", "result"},
    11: {"api"},
    12: {"budget", "explanation", "testing"},
    13: {"cli"},
    14: {"__main__"},
}
"""Every room of ``rewriter``, by its floor; a new one must be put on one."""
FOR_RULES = {"emit", "errors", "facts", "graph", "operators", "quantize", "rule", "target", "tensors"}
"""What a rule may import."""
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def modules(package):
    """The files of a folder; what a link leads to is not among them: ``rewriter/rules`` is the folder ``rules``."""
    return sorted((ROOT / package).rglob("*.py"))


def imported(file):
    """Dotted names of everything that a module imports, ``from a import b`` as ``a.b`` too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(file):
    """The rooms of ``rewriter`` from which a module imports."""
    names = [name.split(".") for name in imported(file)]
    return {parts[1] for parts in names if parts[0] == "rewriter" and len(parts) > 1 and parts[1] in FLOOR_OF}


def room_of(file):
    first = file.relative_to(ROOT / "rewriter").parts[0]
    return first.removesuffix(".py")


def relative(file):
    return str(file.relative_to(ROOT))


def test_every_room_has_a_floor():
    present = {room_of(file) for file in modules("rewriter")} - {"__init__"}
    assert present == set(FLOOR_OF)


@pytest.mark.parametrize("file", modules("rewriter"), ids=relative)
def test_imports_point_down(file):
    room = room_of(file)
    if room == "__init__":
        return
    above = {other for other in rooms(file) - {room} if FLOOR_OF[other] >= FLOOR_OF[room]}
    assert not above, f"{relative(file)} is on floor {FLOOR_OF[room]} and imports {above}, on it or above"


@pytest.mark.parametrize("file", modules("rewriter"), ids=relative)
def test_the_engine_knows_no_rule(file):
    assert not [name for name in imported(file) if name.split(".")[:2] == ["rewriter", "rules"]]


@pytest.mark.parametrize("file", modules("rules"), ids=relative)
def test_a_rule_imports_what_it_is_offered(file):
    offered = FOR_RULES | {"rules"}
    taken = {name.split(".")[1] if "." in name else name for name in imported(file) if name.split(".")[0] == "rewriter"}
    assert taken <= offered


@pytest.mark.parametrize("file", [*modules("rewriter"), *modules("rules")], ids=relative)
def test_private_names_of_other_packages_stand_in_one_file(file):
    private = [
        name
        for name in imported(file)
        if name.split(".")[0] in ("onnxscript", "onnx_ir", "onnx", "onnxruntime")
        and any(part.startswith("_") for part in name.split("."))
    ]
    assert not private or relative(file) == "rewriter/graph/_onnxscript.py", private


@pytest.mark.parametrize("file", [*modules("rewriter"), *modules("rules")], ids=relative)
def test_only_the_command_line_prints(file):
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not prints or room_of(file) == "cli"


@pytest.mark.parametrize("file", [*modules("rewriter"), *modules("rules")], ids=relative)
def test_modules_say_what_they_are(file):
    tree = ast.parse(file.read_text())
    assert not tree.body or ast.get_docstring(tree)


def test_every_family_of_recognisers_is_tested_by_itself():
    families = [file.stem for file in modules("rules/blocks") if " = Family(" in file.read_text()]
    assert len(families) > 10
    missing = [name for name in families if not (ROOT / f"tests/rules/blocks/test_{name}.py").exists()]
    assert not missing, (
        f"tests/rules/blocks/test_{missing[0]}.py states what each of its recognisers makes of a few operators"
    )


def test_every_room_is_on_the_map():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    words = set(re.findall(r"\w+", text))
    assert not {room for room in FLOOR_OF if not room.startswith("_")} - words
    paths = re.findall(r"`((?:rewriter|rules|tests|docs)/[\w/.<>]+)`", text)
    assert not [path for path in paths if "<" not in path and not (ROOT / path).exists()]
