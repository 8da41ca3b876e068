"""Workers of a dask cluster against one of them, and workers that are killed: ``python benchmarks/cluster.py``.

A model of so many gigabytes (float16, unrolled experts, weights in a data file) is written three times in turn: by this
process, by one worker of one thread, and by two such workers, all on this machine; what is timed is saving alone, since
matching is not what workers do. Then two workers write a smaller one again and again while one of the two is killed at
a random moment, and another is started in its place. Each output must hold the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import streaming
from distributed import Client, LocalCluster

import rewriter
from rewriter.io.cluster import warm

LAYERS, EXPERTS = 10, 32


def main() -> int:
    """Runs all trials; returns 1 where an output had other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rules", default="moe-int4")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        folder = Path(name)
        trials = Trials(folder, given.gigabytes, given.rules)
        alone = trials.seconds(None)
        one, two = (trials.with_workers(count) for count in (1, 2))
        print(f"{trials.size / 1e9:.2f} GB; saving takes {alone:.1f} s in this process with all processors,")
        print(f"{one:.1f} s by one worker of one thread, {two:.1f} s by two: {one / two:.2f} times the rate")
        wrong += trials.wrong
        folder = folder / "small"
        trials = Trials(folder, given.gigabytes / 5, given.rules)
        usual = trials.with_workers(2)
        killed = [trials.killed(random.Random(seed).uniform(0, usual)) for seed in range(given.kills)]
        wrong += trials.wrong
        print(f"{trials.size / 1e9:.2f} GB by two workers: {usual:.1f} s; with one killed, at a second and in all:")
        print(", ".join(f"{moment:.1f} {took:.1f} s" for moment, took in killed))
    print(f"{wrong} outputs had other bytes")
    return int(wrong > 0)


class Trials:
    """A model, and what it is rewritten to."""

    def __init__(self, folder: Path, gigabytes: float, rules: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        whole = gigabytes * streaming.LAYERS * streaming.EXPERTS / (LAYERS * EXPERTS)
        model = streaming.make(folder, whole, LAYERS, EXPERTS, born=False)
        self.size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        self.result = rewriter.apply(model, rules, overrides={"parity.local": "none"})
        self.wrong = 0
        self.digest = ""
        self.seconds(None)  # compiles, and finds the input in memory

    def seconds(self, client: Client | None) -> float:
        """Returns how long saving takes."""
        started = time.monotonic()
        self.result.save(self.folder / "out", cluster=client)
        took = time.monotonic() - started
        digest = digest_of(self.folder / "out")
        self.wrong += digest != (self.digest or digest)
        self.digest = digest
        shutil.rmtree(self.folder / "out")
        return took

    def with_workers(self, count: int) -> float:
        """Returns how long saving takes by so many workers of one thread, that have compiled their kernels."""
        with workers(count) as client:
            return self.seconds(client)

    def killed(self, moment: float) -> tuple[float, float]:
        """Kills one of two workers; returns when, and how long saving took."""
        with workers(2) as client:
            pid = next(iter(client.run(os.getpid).values()))
            timer = threading.Timer(moment, os.kill, (pid, signal.SIGKILL))
            timer.start()
            took = self.seconds(client)
            timer.cancel()
            return moment, took


@contextlib.contextmanager
def workers(count: int) -> Iterator[Client]:
    """Starts workers of one thread, and has them import and compile."""
    with (
        LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.run(warm)
        yield client


def digest_of(folder: Path) -> str:
    digest = hashlib.blake2b()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
