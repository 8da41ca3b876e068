"""``rewriter apply``: rewrite, quantize, prove, save, and say what was done."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli import options
from rewriter.cli.options import DEFAULT_RULES, AsJson, Level, Model, Quiet, Rules, Settings, TargetName, given
from rewriter.cli.token_options import given_tokens
from rewriter.errors import UsageError, nearest, warn

if TYPE_CHECKING:
    from rewriter.report.quality import Quality
    from rewriter.report.sized import Sized
    from rewriter.result import Result
    from rewriter.ruleset import RuleSet

_PROOF, _SIZE, _FILES = "Proof and comparison", "Calibration, and bits for a size", "Files, memory and machines"
"""Panels of --help, beside that of the options that most runs take."""


def apply(
    model: Model,
    out: Annotated[Path, given("FOLDER", "Where the rewritten model goes.", "--out", "-o")],
    rules: Rules = DEFAULT_RULES,
    target: TargetName = None,
    settings: Settings = [],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of the same names in an existing output; others stay.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run into this output that was killed; what this one writes is kept if it is killed too.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    cluster: Annotated[
        str | None,
        given(
            "ADDRESS",
            "Let the workers of a dask cluster quantize: its scheduler's address, as tcp://host:8786, or its scheduler"
            " file. They must see model and output under the same paths.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    report: Annotated[Path | None, given("FILE.json", "Write everything that was done; - prints it.")] = None,
    html: Annotated[Path | None, given("FILE.html", "Write the same as a page for people, in one file.")] = None,
    require: Annotated[
        list[str],
        given(
            "RULE",
            "Fail (exit 1) if this rule never fires. May be repeated.",
            autocompletion=options.complete_rules,
            rich_help_panel=_PROOF,
        ),
    ] = [],
    parity: Annotated[
        Level | None,
        typer.Option(
            metavar="class|all|none",
            help="Which rewrites are proved by running them: one to four of each structural class, all, or none; by"
            " default what the rule set says (class). Of a block above 256 MiB (--set parity.max_bytes) only some"
            " experts are run, or none.",
            show_default=False,
            rich_help_panel=_PROOF,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare the outputs of the rewritten model with the original's; by default where the model"
            " is small (1 GiB, 20,000 nodes) and the runtime runs it.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare them.", rich_help_panel=_PROOF)] = False,
    provider: Annotated[
        str | None,
        given(
            "PROVIDER",
            "What runs both models to compare them: cpu, cuda or reference; by default the target's provider. Implies"
            " --check.",
            rich_help_panel=_PROOF,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        given(
            "FILE.npz",
            "Mean squared activations that weigh the error, by the model's own names: of a weight [K], or of an"
            " expert stack [E, K]; or a folder that rewriter calibrate wrote.",
            rich_help_panel=_SIZE,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        given(
            "FOLDER",
            "What the weights saw on real tokens, as rewriter calibrate wrote it; gptq quantizes by it.",
            rich_help_panel=_SIZE,
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        given(
            "FILE.npy",
            "Token ids \\[sequences, length]: run both models on them, for perplexity and KL divergence.",
            rich_help_panel=_PROOF,
        ),
    ] = None,
    sequences: Annotated[
        int | None, given("N", "Use the first N sequences only.", min=1, rich_help_panel=_PROOF)
    ] = None,
    size: Annotated[
        int | None,
        given(
            "SIZE",
            "Choose each weight's bits and blocks for a model of at most so many bytes, by least output error.",
            parser=options.size,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        given(
            "X",
            "Likewise, for the smallest model whose expected KL divergence is below X; needs --calibration. With"
            " --tokens it is measured: if it is larger, forms are chosen anew; fails if that does not help.",
            min=0,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    bits: Annotated[
        float | None,
        given(
            "BITS",
            "Likewise, for so many bits per number of the quantized weights on average, scales and zero points"
            " included, as 4.25. For plain 8 bits: --rules moe-int8, or --set quantization.default.bits=8.",
            callback=options.finite,
            rich_help_panel=_SIZE,
        ),
    ] = None,
    write_plan: Annotated[
        Path | None,
        given(
            "FILE.yaml",
            "Write the chosen forms as a rule set, which gives the same model again.",
            rich_help_panel=_SIZE,
        ),
    ] = None,
    memory: Annotated[
        int | None,
        given(
            "SIZE",
            "Bytes of computed weights held in memory at once while saving; by default 512MiB.",
            parser=options.size,
            rich_help_panel=_FILES,
        ),
    ] = None,
    max_shard_size: Annotated[
        int | None,
        given("SIZE", "Size of each data file; by default there is one.", parser=options.size, rich_help_panel=_FILES),
    ] = None,
    data_name: Annotated[
        str | None,
        given(
            "NAME",
            "Name of the data file, as model.onnx_data for transformers.js and optimum; by default MODEL.onnx.data.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="End the run if a rewrite fails its proof; else it is left out, and the exit code is 1.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite a model by a rule set, quantize its weights, prove the rewrites, and save it.

    The output directory appears complete or not at all, and the input is never written.

    [bold]rewriter apply model.onnx -o out[/bold]
        4-bit experts and linears (rule set moe-int4)
    [bold]rewriter apply model.onnx -o out -r experts-int8 --report out.json[/bold]
        only the experts, in 8 bits, with a full report; --json prints that and nothing else
    [bold]rewriter apply model.onnx -o out --html out.html[/bold]
        with a report that a person reads
    [bold]rewriter apply model.onnx -o out --set quantization.default.block_size=128[/bold]
        one value of the rule set changed
    [bold]rewriter apply model.onnx -o out -r gptq-int4 --calibration calibration[/bold]
        rounding that knows what each weight saw
    [bold]rewriter apply model.onnx -o out -r gptq-mixed --calibration calibration --size 13GB[/bold]
        forms chosen by output error for a size; --max-kl 0.03 chooses the size too
    [bold]rewriter apply model.onnx -o out -r mine.yaml --require unstack --parity all[/bold]
        a rule set of your own, every rewrite proved by running it
    """
    from rewriter.parity import apart

    apart.start()  # it imports the runtime while this process imports all else

    from rewriter import api
    from rewriter.budget.goal import MORE_AIMS, Goal
    from rewriter.cli import applied, comparison, report_files
    from rewriter.cli.budget import fit_to_goal
    from rewriter.cli.console import byte_bar, console, count_bar, print_json, shout, working
    from rewriter.io import Place, load
    from rewriter.io.cluster import connected
    from rewriter.parity.limits import too_far
    from rewriter.parity.model_inputs import require_tokens
    from rewriter.parity.quality import compare_quality
    from rewriter.parity.runtime import missing

    ids = given_tokens(tokens, None, None, 0, sequences)
    if check and no_check:
        raise UsageError("give one of --check and --no-check")
    asked = True if check else False if no_check else None
    rule_set = options.rule_set(rules, settings, parity)
    _require_known(require, rule_set)
    _require_directory(out)
    if provider is not None:
        missing(provider)  # a name that there is none of is said before anything is done
    place = Place.of(out, overwrite=overwrite, keep=[model], resume=resume)
    if report is not None and report_files.is_stdout(report):
        report, as_json = None, True
    if report is not None and report.suffix in report_files.PAGES:
        raise UsageError(f"--report {report}: the report is JSON; --html {report} writes a page")
    if report is not None:
        report_files.refuse(report, place.directory)
    if html is not None:
        report_files.refuse_page(html, place.directory, "report.html")
    if write_plan is not None:
        report_files.refuse_plan(write_plan)
    plan = rule_set.plan
    algorithms = {plan.default.algorithm, *(override.changes.get("algorithm") for override in plan.overrides)}
    if calibration is None and "gptq" in algorithms:
        warn(
            f"rule set '{rule_set.name}' rounds by what weights saw (gptq), and no --calibration is given: mse-search"
            " takes its place; rewriter calibrate makes one"
        )
    silent = quiet or as_json
    if ids is not None:  # now, and not when all is written
        require_tokens(load(model), ids)

    def rewritten(rule_set: RuleSet, place: Place) -> tuple[Result[Any], Path]:
        with connected(cluster) as client:
            with working(f"reading {model}", quiet=silent) as tell:
                result: Result[Any] = api.apply(
                    model,
                    rule_set,
                    target=target,
                    imatrix=imatrix,
                    calibration=calibration,
                    progress=lambda phase, count: tell(options.progress(phase, count)),
                    strict=strict,
                )
            with byte_bar(f"writing {out}", quiet=silent) as told:
                saved = result.save(
                    place,
                    cluster=client,
                    memory=memory,
                    max_shard_size=max_shard_size,
                    data_name=data_name,
                    progress=told,
                )
        return result, saved

    def on_tokens(saved: Path) -> Quality | None:
        if ids is None:
            return None
        with count_bar("running both models", "sequences", quiet=silent) as told:
            quality = compare_quality(model, saved, ids, provider=provider or "cpu", progress=told)
        return dataclasses.replace(quality, failures=too_far(quality, max_kl))

    why: Sized | None = None
    goal, fit = Goal(size, bits, max_kl), rule_set
    inputs: dict[str, Any] = {"target": target, "imatrix": imatrix, "calibration": calibration}
    if goal != Goal() or write_plan is not None:
        if place.leftovers and calibration is None:
            warn("what --size and --bits choose is worked out anew; --write-plan keeps it as a rule set")
        fit, why = fit_to_goal(model, rules, rule_set, goal, write_plan, tokens, quiet=silent, **inputs)
    result, saved = rewritten(fit, place)
    quality = on_tokens(saved)
    for _ in range(MORE_AIMS):
        if quality is None or not quality.failures or goal.kl is None or not math.isfinite(quality.kl.value):
            break
        goal = goal.lower(quality.kl.value)
        warn(f"{quality.failures[0]} on these tokens: choosing anew for {goal}")
        try:
            fit, why = fit_to_goal(model, rules, rule_set, goal, write_plan, tokens, quiet=silent, **inputs)
        except UsageError as error:
            warn(f"what was chosen before stays: {error}")
            break
        result, saved = rewritten(fit, Place.of(out, overwrite=True, keep=[model], resume=resume))
        quality = on_tokens(saved)
    with working("comparing with the original", quiet=silent):
        found = comparison.compare(result, asked, provider)
    done = result.report
    origin = dataclasses.replace(done.provenance, command=shlex.join(["rewriter", *sys.argv[1:]]))
    done = dataclasses.replace(done, parity=found, provenance=origin, sized=why, quality=quality)

    applied.show_report(console(quiet=silent), done, rule_set, model, report)
    if report is not None:
        report_files.write(report, json.dumps(done.to_json(), indent=1, allow_nan=False) + "\n")
    if html is not None:
        from rewriter.html import page

        report_files.write(html, page(done))
    applied.show_files(console(quiet=silent), done, saved, report, html)
    if as_json:
        print_json(done.to_json())
    if failures := applied.failures(done, require):
        for failure in failures:
            shout(f"{failure}; the output is kept")
        raise typer.Exit(1)


def _require_directory(out: Path) -> None:
    if out.suffix == ".onnx" and out.parent == Path() and not out.is_dir():
        name = out.stem
        raise UsageError(f"the output '{out}' needs a directory, as -o {name} or -o {name}/{out}")


def _require_known(required: list[str], rule_set: RuleSet) -> None:
    known = {rule.name for phase in rule_set.phases for rule in phase.rules}
    for rule in required:
        if rule not in known:
            raise UsageError(f"--require {rule}: rule set '{rule_set.name}' has no such rule{nearest(rule, known)}")
