"""Each kind of fault, with its exact place."""

from __future__ import annotations

import os
import re

import pytest

from rewriter.errors import RuleSetError
from rewriter.ruleset import load, parse_override

PHASE = "phases: [{name: a, rules: [drop-cast]}]\n"

FAULTS = {
    "unknown key": ("descripton: x", "1:1: unknown key 'descripton' (did you mean 'description'?)"),
    "unknown key below": (
        "quantization:\n  default:\n    bits: 4\n    blocksize: 32",
        "4:5: unknown key 'blocksize' (did you mean 'block_size'?)",
    ),
    "unknown key, nothing close": (
        "phases:\n- zzz: 1",
        "2:3: unknown key 'zzz' (valid: max_sweeps, name, rules)",
    ),
    "key that is no text": ("3: x", "1:1: unknown key '3' (valid: accuracy_level, description, extends,"),
    "wrong type": ("description: 3", "1:14: 'description' should be a valid string, not 3"),
    "not a mapping": ("- a\n- b", "1:1: a rule set is a mapping, not a list"),
    "part that is not a mapping": ("parity: all", "1:9: 'parity' should be a mapping, not 'all'"),
    "list wanted": ("phases: unstack", "1:9: 'phases' should be a valid list, not 'unstack'"),
    "missing": ("phases:\n  - rules: [drop-cast]", "2:5: 'name' is missing"),
    "no rules": ("phases:\n  - name: a\n    rules: []", "3:12: 'rules' is empty"),
    "sweeps": ("phases: [{name: a, rules: [drop-cast], max_sweeps: 0}]", "1:52: 'max_sweeps' should be greater than"),
    "duplicate phase": (
        "phases:\n- {name: a, rules: [drop-cast]}\n- {name: a, rules: [drop-cast]}",
        "3:10: duplicate phase 'a'",
    ),
    "bits": ("quantization: {default: {bits: 5}}", "1:32: 'bits' should be 2, 3, 4 or 8, not 5"),
    "bits as text": ("quantization: {default: {bits: '4'}}", "1:32: 'bits' should be 2, 3, 4 or 8, not '4'"),
    "bits as float": ("quantization: {default: {bits: 4.0}}", "1:32: 'bits' should be 2, 3, 4 or 8, not 4.0"),
    "block size": (
        "quantization: {default: {block_size: 48}}",
        "1:38: 'block_size' should be 0, 16, 32, 64, 128 or 256, not 48",
    ),
    "block size that equals 0": (
        "quantization: {default: {block_size: no}}",
        "1:38: 'block_size' should be 0, 16, 32, 64, 128 or 256, not False",
    ),
    "symmetric": ("quantization: {default: {symmetric: 1}}", "1:37: 'symmetric' should be a valid boolean, not 1"),
    "algorithm": (
        "quantization: {default: {algorithm: k_quant}}",
        "1:37: unknown algorithm 'k_quant' (did you mean 'k-quant'?)",
    ),
    "empty selector": ("quantization: {exclude: [{}]}", "1:26: selects nothing: give one of nodes, weights, role,"),
    "override of nothing": (
        "quantization:\n  overrides:\n    - {bits: 8}",
        "3:7: selects nothing: give one of nodes, weights, role, layers",
    ),
    "override by nothing": (
        "quantization:\n  overrides:\n    - {role: lm_head}",
        "3:7: changes nothing: give one of algorithm, bits, block_size, symmetric",
    ),
    "override key": (
        "quantization:\n  overrides:\n    - {roles: lm_head, bits: 8}",
        "3:8: unknown key 'roles' (did you mean 'role'?)",
    ),
    "glob": ("quantization: {exclude: [{nodes: [a, 3]}]}", "1:38: 'nodes' should be a valid string, not 3"),
    "layers": (
        "quantization: {exclude: [{layers: first}]}",
        "1:35: 'layers' has no layer range in 'first' (write 5, '0-3', '24-' or 'sensitive')",
    ),
    "layers backwards": (
        "quantization: {exclude: [{layers: [1, 3-0]}]}",
        "1:35: 'layers' has the range '3-0', which ends before it begins",
    ),
    "layers empty": ("quantization: {exclude: [{layers: []}]}", "1:35: 'layers' is empty"),
    "parity": (
        "parity: {local: al}",
        "1:17: 'local' should be 'class', 'all' or 'none', not 'al' (did you mean 'all'?)",
    ),
    "parity limit": ("parity: {max_relative_l2: -1}", "1:27: 'max_relative_l2' should be greater than or equal to 0"),
    "parity not finite": ("parity: {min_snr_db: .nan}", "1:22: 'min_snr_db' should be a finite number, not nan"),
    "parity share": ("parity: {min_top1: 99}", "1:20: 'min_top1' should be less than or equal to 1, not 99"),
    "unknown rule": (
        "phases:\n  - name: a\n    rules:\n      - drop-cast\n      - drop-identty",
        "5:9: unknown rule 'drop-identty' (did you mean 'drop-identity'?)",
    ),
    "unknown rule with options": (
        "phases:\n  - name: a\n    rules:\n      - drop_cast: {x: 1}",
        "4:9: unknown rule 'drop_cast' (did you mean 'drop-cast'?)",
    ),
    "rule entry": (
        "phases: [{name: a, rules: [{drop-cast: , drop-identity: }]}]",
        "1:28: a rule is its id, or 'id: {option: value}', not {",
    ),
    "rule entry of a wrong type": (
        "phases: [{name: a, rules: [7]}]",
        "1:28: a rule is its id, or 'id: {option: value}'",
    ),
    "unknown option": (
        "phases:\n- name: a\n  rules:\n  - drop-identity: {accuracy: 4}",
        "4:21: unknown option 'accuracy' of rule drop-identity (did you mean 'accuracy_level'?)",
    ),
    "rule without options": (
        "phases: [{name: a, rules: [drop-cast: {x: 1}]}]",
        "1:40: unknown option 'x' of rule drop-cast (it has none)",
    ),
    "option type": (
        "phases:\n- name: a\n  rules:\n  - drop-identity:\n      accuracy_level: true",
        "5:23: 'accuracy_level' should be a valid integer, not True",
    ),
    "option choice": (
        "phases: [{name: a, rules: [drop-identity: {mode: fats}]}]",
        "1:50: 'mode' should be 'fast' or 'exact', not 'fats' (did you mean 'fast'?)",
    ),
    "option list": (
        "phases: [{name: a, rules: [drop-identity: {axes: [1, x]}]}]",
        "1:54: 'axes' should be a valid integer, not 'x'",
    ),
    "option tuple": ("phases: [{name: a, rules: [drop-identity: {names: x}]}]", "1:51: 'names' should be a valid list"),
    "option refused by the rule": (
        "phases: [{name: a, rules: [drop-identity: {accuracy_level: -1}]}]",
        "1:43: rule drop-identity refuses its options: ValueError: accuracy_level is negative",
    ),
    "duplicate key": (
        "description: a\nparity: {}\ndescription: b",
        "3:1: duplicate key 'description' (first on line 1)",
    ),
    "duplicate key below": ("parity: {local: all, local: none}", "1:22: duplicate key 'local' (first on line 1)"),
    "nothing to drop": (
        "extends: base\nquantization: {drop: [{role: routers}]}",
        "2:23: what this rule set extends has no entry 'role routers' in include or exclude (did you mean 'role rou",
    ),
    "no YAML": ("parity: {local: all", "1:20: not valid YAML: expected ',' or '}', but got '<stream end>'"),
    "tab": ("parity:\n\tlocal: all", "2:1: not valid YAML: found character '\\t' that cannot start any token"),
    "two documents": ("description: a\n---\ndescription: b", "2:1: not valid YAML: but found another document"),
    "unsafe tag": (
        "description: !!python/object/apply:os.getcwd []",
        "1:14: not valid YAML: could not determine a con",
    ),
    "alias inside itself": ("phases: &a [*a]", "1:9: an alias inside its own anchor"),
    "unknown alias": ("phases: *a", "1:9: not valid YAML: found undefined alias 'a' (quote"),
    "glob without quotes": (
        "quantization: {exclude: [{nodes: */head}]}",
        "1:35: not valid YAML: expected alphabetic or numeric character, but found '/' (quote a pattern that begins",
    ),
    "empty": ("# nothing\n", "1:1: the rule set is empty"),
    "impossible date": (
        "description: 2001-99-99",
        " not valid YAML: a value is not of the kind that it says (ValueError: month must be in 1..12)",
    ),
    "control character": ("description: \x07", " not valid YAML: unacceptable character #x0007"),
    "options of a rule that is not there": (
        "extends: base\noptions: {drop-cast: {a: 1}}",
        "2:11: no phase lists a rule 'drop-cast' (did you mean 'drop-identity'?)",
    ),
    "options that are none": (
        "extends: base\noptions: {drop-identity: 3}",
        "2:26: 'drop-identity' should be a mapping",
    ),
    "deep": ("[" * 5000, " not valid YAML: nested too deeply"),
    "unknown base": ("extends: bas", "1:10: unknown rule set 'bas' (did you mean 'base'?)"),
    "missing file": ("extends: [base, ./other.yaml]", "1:17: rule set file 'other.yaml' does not exist"),
    "itself": ("extends: set.yaml", "1:10: extends cycle: set.yaml -> set.yaml"),
    "through an anchor": (
        "phases:\n- &p {name: a, rules: [drop-cast], sweeps: 3}\n- *p",
        "2:36: unknown key 'sweeps' (did you mean 'max_sweeps'?)",
    ),
    "through a merge key": (
        "quantization:\n  default: {<<: {bits: 5}, block_size: 32}",
        "2:24: 'bits' should be 2, 3, 4 or 8, not 5",
    ),
}


@pytest.mark.parametrize(("text", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_in_yaml_is_one_line_with_its_place(toy, write, text, message):
    with pytest.raises(RuleSetError) as caught:
        load(write(text))
    assert str(caught.value).startswith(f"set.yaml:{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bse", "unknown rule set 'bse' (did you mean 'base'?)"),
        ("no/such.yaml", "rule set file 'no/such.yaml' does not exist"),
        (3, "a rule set is a name, a file, a mapping or a list of rules, not int"),
        ([], "rule set 'inline' has no phases, so there is nothing to run"),
        ({"description": "x"}, "rule set 'inline' has no phases, so there is nothing to run"),
        ([3], "rules [0]: a rule is an onnxscript rule or a rule's id, not int"),
        (["drop-cast", "drop-cats"], "rules [1].drop-cats: unknown rule 'drop-cats' (did you mean 'drop-cast'?)"),
        ({"parity": {"seed": -1}}, "rule set parity.seed: 'seed' should be greater than or equal to 0, not -1"),
        (
            {"phases": [{"name": "a", "rules": [{"drop-identity": {"axes": [None]}}]}]},
            "rule set phases[0].rules[0].drop-identity.axes[0]: 'axes' should be a valid integer, not None",
        ),
    ],
)
def test_fault_in_python(toy, write, source, message):
    with pytest.raises(RuleSetError, match=f"^{re.escape(message)}$"):
        load(source)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"quantization.default.bitz": 8},
            "override quantization.default.bitz: unknown key 'bitz' (did you mean 'bits'?)",
        ),
        ({"quantization.default.bits": 5}, "override quantization.default.bits: 'bits' should be 2, 3, 4 or 8, not 5"),
        ({"parity.local.x": 1}, "override parity.local: 'local' should be 'class', 'all' or 'none', not {'x': 1}"),
        ({"parity": {}, "parity.local": 1, "parity.local.x": 1}, "override parity.local.x: given twice, or inside"),
        ({"extends": "base"}, "override extends: a rule set's base cannot be overridden"),
        ({"phases": []}, "override phases: changes nothing: a phase is replaced by one of the same name"),
        ({"options.drop-identity.mod": 1}, "override options.drop-identity.mod: unknown option 'mod' of rule"),
        ({"options.drop-cast": {}}, "override options.drop-cast: no phase lists a rule 'drop-cast'"),
    ],
)
def test_fault_in_override(toy, overrides, message):
    with pytest.raises(RuleSetError, match=f"^{re.escape(message)}"):
        load("base", overrides=overrides)


def test_fault_in_an_extended_file_is_placed_there(toy, write):
    write("parity: {sed: 1}", "deep/b.yaml")
    with pytest.raises(RuleSetError, match=r"^deep/b\.yaml:1:10: unknown key 'sed'"):
        load(write("extends: deep/b.yaml"))


def test_cycle_through_files_names_all_of_it(toy, write):
    write("extends: [base, c.yaml]", "sub/b.yaml")
    write("extends: ../set.yaml", "sub/c.yaml")
    cycle = "set.yaml -> sub/b.yaml -> sub/c.yaml -> sub/../set.yaml"
    with pytest.raises(RuleSetError, match=f"^{re.escape(f'sub/c.yaml:1:10: extends cycle: {cycle}')}$"):
        load(write("extends: sub/b.yaml"))


def test_unreadable_file(toy, write, tmp_path):
    (tmp_path / "work" / "latin.yaml").write_bytes(b"description: caf\xe9")
    with pytest.raises(RuleSetError, match=r"^rule set file 'latin.yaml' is not text in UTF-8; give"):
        load("latin.yaml")
    (tmp_path / "work" / "folder.yaml").mkdir()
    with pytest.raises(RuleSetError, match=r"^rule set file 'folder.yaml' is not a regular file"):
        load("folder.yaml")


def test_shipped_set_may_not_name_a_file(offer):
    name = offer({"sets/x.yaml": "extends: ../y.yaml\n"})
    with pytest.raises(RuleSetError, match=rf"^{name}/sets/x\.yaml:1:10: unknown rule set '\.\./y\.yaml'"):
        load("x")


def test_exponential_aliases_end(toy, write):
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    with pytest.raises(RuleSetError, match=r"^set\.yaml:1:1: unknown key 'a0'"):
        load(write("\n".join(lines)))


HOSTILE = {
    "no truth value": "description: !!bool maybe",
    "no integer": "description: !!int twelve",
    "no number": "description: !!float many",
    "no date": "description: !!timestamp soon",
    "no bytes": "description: !!binary é",
    "no set": "description: !!set [a]",
    "a list as a key": "? [a]\n: b",
    "a mapping as a key": "? {a: b}\n: c",
    "merge of text": "<<: text",
    "deep": "description: " + "[" * 5000,
    "deep mapping": "description: " + "{a: " * 2000,
    "layers past all": "quantization: {exclude: [{layers: 9999999999999999999999}]}",
    "a range past all": "quantization: {exclude: [{layers: '0-9223372036854775807'}]}",
    "a range of a million digits": f"quantization: {{exclude: [{{layers: '0-{'9' * 10**6}'}}]}}",
    "digits of another script": "quantization: {exclude: [{layers: '٣'}]}",
    "a negative layer": "quantization: {exclude: [{layers: -1}]}",
    "an integer of a million digits": f"parity: {{seed: {'9' * 10**6}}}",
    "an infinite limit": "parity: {max_relative_l2: .inf}",
    "a name with NUL": 'extends: "a\\0b.yaml"',
    "a folder with NUL": 'extends: "./a\\0b.yaml"',
    "a long name": f"extends: ./{'a' * 5000}.yaml",
    "an empty name": "extends: ''",
    "the root": "extends: /",
    "nothing": "# a comment",
    "null": "null",
    "bytes of another text": "\x00",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ndescription: *c",
    "many keys": "\n".join(f"k{i}: 1" for i in range(20000)),
    "itself": "extends: set.yaml",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_yaml_is_one_short_line(toy, write, text):
    name = write(text)
    with pytest.raises(RuleSetError) as caught:
        load(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(RuleSetError):
        load("base", overrides=dict([parse_override(f"description=[{text}]")]))


def test_a_file_that_is_no_rule_set_is_not_shown(toy, write, tmp_path):
    write("root:x:0:0:secret:/root:/bin/sh\n", "passwd")
    write("root:x:0:0:secret:/root:/bin/sh\n", "passwd.yaml")
    for name in ("passwd", "./passwd", "../work/passwd", str(tmp_path / "work" / "passwd"), "./passwd.yaml"):
        with pytest.raises(RuleSetError, match=r"'.*passwd' does not$|a rule set is a mapping, not text$"):
            load(write(f"extends: {name}"))


def test_long_chains_and_wide_ones_end(toy, write):
    write(PHASE, "0.yaml")
    for index in range(1, 1000):
        write(f"extends: ./{index - 1}.yaml", f"{index}.yaml")
    assert load("20.yaml").phases
    with pytest.raises(RuleSetError, match="extends more than 32 rule sets one by way of the other, or 256 in all"):
        load("999.yaml")
    for index in range(1000):
        write(PHASE, f"{index}.yaml")
    with pytest.raises(RuleSetError, match="or 256 in all"):
        load(write(f"extends: [{', '.join(f'./{index}.yaml' for index in range(1000))}]"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(toy, write, tmp_path):
    os.mkfifo(tmp_path / "work" / "pipe.yaml")
    for name in ("pipe.yaml", write("extends: ./pipe.yaml")):
        with pytest.raises(RuleSetError, match="is not a regular file"):
            load(name)


def test_a_rule_set_of_any_length_is_refused(toy, write):
    with pytest.raises(RuleSetError, match="characters are no rule set; select weights by patterns"):
        load(write("# " + "x" * (9 << 20)))
