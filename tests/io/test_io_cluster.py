"""Workers of a cluster quantize: no weight is sent, the same bytes come out, whoever dies meanwhile."""

from __future__ import annotations

import dataclasses
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from distributed import Client, LocalCluster
from onnx import TensorProto, helper, numpy_helper

import rewriter
from rewriter import api
from rewriter.calibration.capture import calibrate
from rewriter.cli import main
from rewriter.errors import ParityError, RewriterWarning, UsageError
from rewriter.graph.contents import stored_tensors
from rewriter.io import writes
from rewriter.io.cluster import Cluster, connected, perform, warm
from rewriter.io.identity import code
from rewriter.quantize import ALGORITHMS

GRANITE = Path(__file__).parents[1] / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
RULES: dict[str, Any] = {"rules": "moe-int4", "overrides": {"parity.local": "none"}}
SHARDS = 30_000
WEIGHTS = 26


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Granite with its weights in a data file."""
    path = tmp_path_factory.mktemp("in") / "model.onnx"
    onnx.save(onnx.load(GRANITE), path, save_as_external_data=True, location="model.data", size_threshold=1024)
    return path


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    out = tmp_path_factory.mktemp("whole") / "out"
    result = rewriter.apply(model, **RULES)
    result.save(out, max_shard_size=SHARDS)
    return everything(out), result.report.weights


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster) as found:
        yield found


def planned(result: api.Result[Any]) -> tuple[writes.Write, ...]:
    slots = [slot for slot in stored_tensors(result.ir_model) if slot.tensor.nbytes > 1024]
    return writes.plan(slots, lambda index, _: f"{index}.data", None).writes


@pytest.mark.parametrize("step", [writes.STEP, 1])
def test_what_is_sent_holds_no_weight_and_makes_the_same_write(
    step: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "STEP", step)
    found = [write for write in planned(rewriter.apply(model, **RULES)) if write.jobs]
    assert len(found) == (14 if step > 1 else WEIGHTS)
    folders = [tmp_path / "here", tmp_path / "sent"]
    for folder in folders:
        folder.mkdir()
        (folder / "0.data").touch()
    for write in found:
        weights = b"".join(job.weight.numpy().tobytes()[:64] for job in write.jobs)
        sent = pickle.dumps(write.task)
        assert len(sent) < 20_000 and not any(weights[i : i + 64] in sent for i in range(0, len(weights), 64))
        assert write.task(folders[0]) == pickle.loads(sent)(folders[1])
        assert all(write.lies_in(folder, write.task(folder)) for folder in folders)
    assert everything(folders[0]) == everything(folders[1])


def test_a_cluster_writes_the_same_bytes_and_reports_the_same_errors(
    client: Client, model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rewriter.apply(model, **RULES)
    monkeypatch.setattr("rewriter.quantize.job.measure", lambda *_: pytest.fail("quantized in this process"))
    result.save(tmp_path / "out", cluster=client, max_shard_size=SHARDS)
    assert (everything(tmp_path / "out"), result.report.weights) == whole


@pytest.mark.parametrize("rules", ["moe-int4", "fuse-experts"])
def test_workers_copy_and_read_back(
    rules: str, client: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rewriter.apply(model, rules, overrides={"parity.local": "none"})
    result.save(tmp_path / "here", max_shard_size=SHARDS)
    for what in ("TensorTask.__call__", "QuantizeTask.__call__", "digest_of_range"):
        monkeypatch.setattr(f"rewriter.io.writes.{what}", lambda *_: pytest.fail("done in this process"))
    result.save(tmp_path / "there", max_shard_size=SHARDS, cluster=client)
    assert everything(tmp_path / "here") == everything(tmp_path / "there")


@pytest.mark.parametrize("place", [0, 20_000, -1])
def test_a_byte_that_changes_after_it_was_written_is_found(
    place: int, client: Client, model: Path, tmp_path: Path
) -> None:
    def change(done: int, total: int) -> None:
        if done == total:
            (file,) = tmp_path.glob(".*/*.data")
            data = bytearray(file.read_bytes())
            data[place] ^= 1
            file.write_bytes(data)

    with pytest.raises(ParityError, match="does not hold what was computed"):
        rewriter.apply(model, **RULES).save(tmp_path / "out", cluster=client, data_name="m.data", progress=change)
    assert list(tmp_path.iterdir()) == []


def test_every_algorithm_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name, quantize in ALGORITHMS.items():
        monkeypatch.setitem(ALGORITHMS, name, lambda *given, name=name, of=quantize: (of(*given), seen.append(name))[0])
    warm()
    assert seen == list(ALGORITHMS)


def is_warm() -> bool:
    """Whether a process has compiled, or found compiled, what the default algorithm runs."""
    kernels = sys.modules.get("rewriter.quantize.kernels")
    return kernels is not None and any(getattr(kernel, "signatures", ()) for kernel in vars(kernels).values())


def test_workers_compile_while_this_process_does_other_things() -> None:
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as beside:
        assert not any(beside.run(is_warm).values())
        with connected(cluster.scheduler_address):
            deadline = time.monotonic() + 60
            while not all(beside.run(is_warm).values()):
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.mark.parametrize("together", [False, True])
def test_small_weights_are_sent_together(
    together: bool, client: Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.io.cluster.TOGETHER", 1 << 27 if together else 1)
    monkeypatch.setattr("rewriter.io.cluster.ROUNDS", 2)
    found = planned(rewriter.apply(model, **RULES))
    with Cluster(client, 1) as pool:
        groups = list(pool.grouped(found))
    begun = [write for group in groups for write in group]
    assert set(begun) == set(found) and len(begun) == len(found)
    numbers = [sum(job.weight.size for job in write.jobs) for write in begun if write.jobs]
    assert numbers == sorted(numbers, reverse=True) != numbers[::-1]  # none is left over for the last
    assert len(groups) <= 4 if together else len(groups) == len(found)


def test_weights_that_may_take_long_are_sent_one_by_one(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calibration = gptq(tmp_path)
    for given, jobs in ((None, 32), (calibration, 64)):
        slots = stored_tensors(rewriter.apply(path, "gptq-int4", calibration=given).ir_model)
        lazy = [slot for slot in slots if isinstance(slot.tensor, ir.LazyTensor)]
        (write,) = writes.plan(lazy, lambda index, _: f"{index}.data", None).writes
        monkeypatch.setattr("rewriter.io.cluster.TOGETHER", 2 * write.jobs[0].weight.size)
        with Cluster(client, 1) as pool:
            assert len(list(pool.grouped([dataclasses.replace(write) for _ in range(64)]))) == jobs


def test_a_worker_that_dies_loses_nothing(client: Client, model: Path, whole: Any, tmp_path: Path) -> None:
    pids = iter(client.run(os.getpid).values())

    def kill(done: int, total: int) -> None:
        if 3 * done > total and (pid := next(pids, None)) and total > done:
            os.kill(pid, signal.SIGKILL)
            next(pids, None)  # the other one lives

    result = rewriter.apply(model, **RULES)
    result.save(tmp_path / "out", cluster=client, max_shard_size=SHARDS, progress=kill)
    assert next(pids, None) is None, "nobody was killed"
    assert (everything(tmp_path / "out"), result.report.weights) == whole


def test_what_a_cluster_wrote_before_an_interruption_is_not_written_again(
    client: Client, model: Path, whole: Any, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"cluster": client, "resume": True, "max_shard_size": SHARDS}
    with pytest.raises(KeyboardInterrupt), pytest.warns(RewriterWarning, match="is kept"):
        rewriter.apply(model, **RULES).save(tmp_path / "out", progress=interrupt, **options)
    with pytest.warns(RewriterWarning, match=rf"ended: [1-9]\d* of {WEIGHTS} weights"):
        rewriter.apply(model, **RULES).save(tmp_path / "out", **options)
    assert everything(tmp_path / "out") == whole[0]


def test_weights_in_the_model_file_are_quantized_here_and_said_so(client: Client, tmp_path: Path) -> None:
    result = rewriter.apply(GRANITE, **RULES)
    with pytest.warns(RewriterWarning, match="lie in the model file itself, so they are quantized here"):
        result.save(tmp_path / "out", cluster=client, max_shard_size=SHARDS)
    result.save(tmp_path / "here", max_shard_size=SHARDS)
    assert everything(tmp_path / "out") == everything(tmp_path / "here")


def pages_of_arrays(count: int) -> int:
    """Pages that the system gave this process while it filled so many arrays of a mebibyte, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        np.ones(1 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with memory that is freed")
def test_workers_keep_the_memory_that_they_free(client: Client, model: Path, tmp_path: Path) -> None:
    write = next(write for write in planned(rewriter.apply(model, **RULES)) if write.jobs)
    (tmp_path / "0.data").touch()
    for worker in client.scheduler_info()["workers"]:
        client.submit(perform, partial(write.task, tmp_path), code(), workers=[worker], pure=False).result()
    found = client.run(pages_of_arrays, 100)
    assert len(found) == 2 and max(found.values()) < 100 * 256 / 4, found


def test_a_scheduler_is_not_asked_about_its_workers_for_each_write(
    client: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.io.cluster.SOON", 1e6)
    asked, ask = [], client.scheduler_info
    monkeypatch.setattr(client, "scheduler_info", lambda **given: asked.append(given) or ask(**given))
    rewriter.apply(model, **RULES).save(tmp_path / "out", cluster=client, max_shard_size=SHARDS)
    assert len(asked) == 1


def gptq(folder: Path) -> tuple[Path, Path]:
    """A linear in a data file, and what it saw."""
    draw = np.random.default_rng(0)
    weight = numpy_helper.from_array(draw.standard_normal((64, 32)).astype(np.float32), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", d]) for n, d in (("x", 64), ("y", 32)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    feeds = [{"x": draw.standard_normal((256, 64)).astype(np.float32)}]
    calibrate(folder / "m.onnx", folder / "calibration", feeds=feeds)
    return folder / "m.onnx", folder / "calibration"


def test_gptq_goes_the_same_way(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calibration = gptq(tmp_path)
    here, there = (rewriter.apply(path, "gptq-int4", calibration=calibration) for _ in range(2))
    here.save(tmp_path / "here", max_shard_size=SHARDS)
    monkeypatch.setattr("rewriter.quantize.job.measure", lambda *_: pytest.fail("quantized in this process"))
    there.save(tmp_path / "there", max_shard_size=SHARDS, cluster=client)
    assert everything(tmp_path / "here") == everything(tmp_path / "there")
    assert there.report.weights == here.report.weights and here.report.weights[0].output_rms


def test_a_worker_of_another_version_is_named(
    client: Client, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.io.cluster.code", lambda: "0.0.1")
    with pytest.raises(UsageError, match=r"worker tcp://.* runs .*, and this process 0\.0\.1; install the same"):
        rewriter.apply(model, **RULES).save(tmp_path / "out", cluster=client, max_shard_size=SHARDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["output", "input"])
def test_a_worker_that_does_not_see_the_files_is_named(
    missing: str, client: Client, model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model.parent, tmp_path / "in") / "model.onnx"
    write = next(write for write in planned(rewriter.apply(copy, **RULES)) if write.jobs)
    if missing == "input":
        copy.with_name("model.data").rename(tmp_path / "moved.data")
    with pytest.raises(UsageError, match=r"worker tcp://.* cannot read the input or write the output .*No such file"):
        client.submit(perform, partial(write.task, tmp_path / "nowhere"), code()).result()


def test_the_command_line_goes_by_an_address(
    client: Client,
    model: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rewriter.io.cluster.TIMEOUT", 1)
    address = client.scheduler.address
    given = ["apply", str(model), "-o", str(tmp_path / "out"), "--parity", "none", "--no-check", "-q"]
    given += ["--max-shard-size", str(SHARDS), "--cluster"]
    assert main([*given, "tcp://127.0.0.1:1"]) == 2
    said = capsys.readouterr().err
    assert "no dask scheduler answers at 'tcp://127.0.0.1:1'" in said and said.count("\n") == 1
    assert main([*given, address]) == 0
    assert capsys.readouterr().err == ""
    assert everything(tmp_path / "out") == whole[0]


def test_a_command_line_without_dask_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    assert main(["apply", str(model), "-o", str(tmp_path / "out"), "--cluster", "tcp://127.0.0.1:1"]) == 2
    assert 'a cluster needs dask: pip install "distributed>=' in capsys.readouterr().err
