"""What runs a model may crash, have no end or take all memory: that ends one proof, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase
from support import parse

import rewriter
from rewriter.cli import main
from rewriter.errors import ModelError, RuntimeEndedError, TargetError, UnprovedError
from rewriter.io import load
from rewriter.parity import apart, sessions
from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime
from rewriter.parity.worker import send

FOREVER = """m = Constant<value=int64 {9223372036854775807}>() c = Constant<value=bool {1}>()
  z = Loop(m, c, r)<body = b (int64 i, bool d, float[t, 3] a) => (bool e, float[t, 3] o) {
    e = Identity(d) o = Add(a, a) }>"""
ONES = {"x": np.ones((2, 3), np.float32)}


def proto(body):
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{body}')


ENDLESS = proto(f"g (float[t, 3] x) => (float[t, 3] z) {{ r = Relu(x) {FOREVER} }}")
SMALL = proto("g (float[t, 3] x) => (float[t, 3] y) { y = Relu(x) }")
HUGE = proto("g (int64[k] s) => (float y) { a = ConstantOfShape(s) y = ReduceSum<keepdims=0>(a) }")


def the_worker():
    apart.start()
    return apart._WORKERS[0].process


@pytest.fixture
def crashing(monkeypatch):
    """A worker that is killed by a fault in the first call of a kind, as a runtime's own code may be."""

    def plant(runtime, kind=signal.SIGFPE):
        answer = apart._Worker.answer

        def hit(self, call, arguments, timeout):
            if isinstance(arguments[0], sessions.Settings) and arguments[0].runtime == runtime:
                os.kill(self.process.pid, kind)
            return answer(self, call, arguments, timeout)

        monkeypatch.setattr(apart._Worker, "answer", hit)

    return plant


@pytest.mark.parametrize("runtime", [OrtRuntime(timeout=0.5), ReferenceRuntime(timeout=0.5)])
def test_a_loop_without_end_ends(runtime):
    with pytest.raises(RuntimeEndedError, match=r"did not come to an end in 0\.5 s"):
        runtime.run(ENDLESS, ONES)
    assert (runtime.run(SMALL, ONES)["y"] == 1).all()


@pytest.mark.parametrize("runtime", [OrtRuntime(), ReferenceRuntime()])
def test_one_that_asks_for_more_memory_than_there_is(runtime):
    with pytest.raises(RuntimeEndedError, match="more memory than there is"):
        runtime.run(HUGE, {"s": np.array([10**6, 10**4, 100])})
    assert (runtime.run(SMALL, ONES)["y"] == 1).all()


@pytest.mark.parametrize(
    ("kind", "said"),
    [(signal.SIGFPE, "SIGFPE"), (signal.SIGABRT, "SIGABRT"), (signal.SIGKILL, "for want of memory")],
)
def test_a_crash_is_an_error_of_that_run(crashing, monkeypatch, kind, said):
    crashing("cpu", kind)
    with pytest.raises(RuntimeEndedError, match=said):
        OrtRuntime().run(SMALL, ONES)
    monkeypatch.undo()
    assert (OrtRuntime().run(SMALL, ONES)["y"] == 1).all()


def test_a_worker_that_others_end_between_two_runs_is_replaced():
    first = the_worker()
    first.kill()
    first.wait()
    assert (OrtRuntime().run(SMALL, ONES)["y"] == 1).all() and the_worker() is not first


def test_a_session_of_a_worker_that_ended_says_so():
    loaded = OrtRuntime().load(SMALL)
    assert (loaded.run(ONES)["y"] == 1).all()
    the_worker().kill()
    the_worker().wait()
    with pytest.raises(TargetError, match="ended since the model was loaded"):
        loaded.run(ONES)


def test_large_arrays_go_there_and_back():
    x = np.random.default_rng(0).standard_normal((300_000, 3), dtype=np.float32)
    for array in (x, x[:5], np.asfortranarray(x), x[::2], x[:0]):
        assert np.array_equal(OrtRuntime().run(SMALL, {"x": array})["y"], np.maximum(array, 0))


@pytest.fixture
def in_file(tmp_path):
    """The elements [300000, 3] of a tensor in a data file, and the file."""
    weight = ir.tensor(np.random.default_rng(0).standard_normal((300_000, 3), dtype=np.float32), name="w")
    body = "g (float[300000, 3] x) => (float[300000, 3] y) <float[300000, 3] w> { y = Add(x, w) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>{body}', initializers=[weight])
    ir.save(model, tmp_path / "model.onnx", external_data="data")
    return load(tmp_path / "model.onnx").graph.initializers["w"].const_value.numpy(), tmp_path / "data"


def test_arrays_of_a_mapped_file_are_read_there(in_file, monkeypatch):
    array, _ = in_file
    sent = []
    monkeypatch.setattr(apart, "send", lambda *arguments: sent.append(send(*arguments)) or sent[-1])
    for part in (array, array[16:]):
        assert np.array_equal(OrtRuntime().run(SMALL, {"x": part})["y"], np.maximum(part, 0))
    assert not any(sent)
    for part in (array[1:], array.copy(), np.asfortranarray(array)):  # none of these lies there aligned
        assert np.array_equal(OrtRuntime().run(SMALL, {"x": part})["y"], np.maximum(part, 0))
    assert sum(size > 0 for size in sent) == 3


def test_a_mapped_file_that_changed_is_not_read_there(in_file):
    array, file = in_file
    os.utime(file, (1, 1))
    with pytest.raises(ModelError, match="was changed while it was read"):
        OrtRuntime().run(SMALL, {"x": array})
    assert (OrtRuntime().run(SMALL, ONES)["y"] == 1).all()


def test_sessions_give_outputs_that_own_their_memory():
    model = np.frombuffer(SMALL.SerializeToString(), np.uint8)
    assert sessions.run(sessions.Settings("cpu"), model, ONES)["y"].flags.owndata


def test_where_no_process_can_be_started_models_run_in_this_one(monkeypatch):
    the_worker()
    while apart._WORKERS:
        apart._WORKERS.pop().end()

    def refuse(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert (OrtRuntime().run(SMALL, ONES)["y"] == 1).all() and not apart._WORKERS


def test_a_forked_process_has_a_worker_of_its_own():
    first = the_worker()
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        assert (OrtRuntime().run(SMALL, ONES)["y"] == 1).all() and the_worker() is first
        return
    right = False
    try:
        right = (OrtRuntime().run(SMALL, ONES)["y"] == 1).all() and the_worker().pid != first.pid
        the_worker().kill()
    finally:
        os._exit(not right)


def test_threads_take_turns():
    found = []
    threads = [threading.Thread(target=lambda: found.append(OrtRuntime().run(SMALL, ONES)["y"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all((y == 1).all() for y in found)


class Double(RewriteRuleClassBase):
    """Relu(x), and what is behind it -> something that never ends, or itself."""

    def __init__(self, *, endless=False):
        super().__init__(name="double")
        self._endless = endless

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        if not self._endless:
            return op.Max(x, op.Sub(x, x))
        (loop,) = (node for node in ir.from_proto(ENDLESS).graph if node.op_type == "Loop")
        return op.Loop(
            op.initializer(ir.tensor(np.array(2**63 - 1), name="most")),
            op.initializer(ir.tensor(np.array(True), name="more")),
            x,
            body=loop.attributes["body"].as_graph(),
        )


def relu(shape="t, 3"):
    return parse(f"g (float[{shape}] x) => (float[{shape}] y) {{ [n] y = Relu(x) }}")


def test_a_replacement_without_end_is_left_out_and_the_run_goes_on():
    result = rewriter.apply(relu(), [Double(endless=True)], overrides={"parity.timeout": 0.5})
    (decline,) = result.report.declines
    assert decline.failed and "could not be proved and was left out" in decline.reason
    assert "did not come to an end in 0.5 s" in decline.reason
    assert [node.op_type for node in result.ir_model.graph] == ["Relu"]
    with pytest.raises(UnprovedError, match="could not be proved"):
        rewriter.apply(relu(), [Double(endless=True)], overrides={"parity.timeout": 0.5}, strict=True)


def test_an_original_that_crashes_the_runtime_is_left_out_loudly(crashing):
    crashing("cpu")
    (decline,) = rewriter.apply(relu(), [Double()]).report.declines
    assert decline.failed and "what it replaces cannot be run" in decline.reason and "SIGFPE" in decline.reason


def test_a_declared_size_that_is_not_drawn_is_said_before_it_is():
    (decline,) = rewriter.apply(relu("10000000, 128"), [Double()]).report.declines
    assert decline.failed and "declared as [10000000, 128]: 5.12 GB are not drawn" in decline.reason


@pytest.fixture
def saved(tmp_path):
    def save(model, name="model.onnx"):
        onnx.save(model if isinstance(model, onnx.ModelProto) else ir.to_proto(model), tmp_path / name)
        return tmp_path / name

    return save


def applied(file, *options):
    return main(["apply", str(file), "-o", str(file.parent / "out"), "-r", "unstack", *options])


def test_a_model_without_end_is_written_and_not_compared(saved, capsys):
    file = saved(ENDLESS)
    assert applied(file, "--set", "parity.timeout=0.5") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Not compared with the original: the original does not run: the runtime did not come to an end" in said
    assert (file.parent / "out" / "model.onnx").exists()
    assert applied(file, "--overwrite", "--check", "--set", "parity.timeout=0.5") == 1


def test_a_model_of_a_size_that_is_not_drawn_is_written_and_not_compared(saved, capsys):
    file = saved(relu("10000000, 128"))
    assert applied(file) == 0
    assert "5.12 GB are not drawn at random" in " ".join(capsys.readouterr().out.split())


def test_check_has_a_time_limit(saved, capsys):
    file = saved(ENDLESS)
    assert main(["check", str(file), str(file), "--timeout", "0.5"]) == 2
    assert "did not come to an end in 0.5 s" in capsys.readouterr().err


def started(file):
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # jobs of a shell ignore it
    code = f"import signal, sys; {heard}; from rewriter.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "check", str(file), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def is_there(pid):
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_told_to_end_takes_its_worker_along(saved, number, code):
    process = started(saved(ENDLESS))
    until = time.monotonic() + 60
    while not (found := children(process.pid)) or not busy(found[0]):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in said
    while is_there(found[0]):
        assert time.monotonic() < until
        time.sleep(0.05)


def busy(pid):
    """Whether a process has worked for a second: it runs what has no end by then."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK") > 1
