"""Kills a run of several processes repeatedly, and compares its result with that of an uninterrupted run.

  python benchmarks/kills.py --kills=10 --folder=/tmp/kills

Processes joined by jax.distributed train a nano model on drawn clips, on four devices in all. All or one of
them are killed (-9), at random moments and while a checkpoint is written, and started again, also with
another number of processes. Metrics, data positions and every array must then equal those of the
uninterrupted run bit for bit; otherwise the exit status is not 0.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 4
BINDINGS = (f"pipeline.DataConfig.batch_rows = {DEVICES}", f"pipeline.DataConfig.streams = {DEVICES}",
            "train.TrainConfig.keep = 2")
LIMIT = 240  # seconds; default limit of every wait


class Run:
    """One work directory, trained by varying numbers of processes in turn."""

    def __init__(self, gin_file, workdir, bindings=(), limit=LIMIT):
        self.workdir, self.processes, self._limit = pathlib.Path(workdir), [], limit
        self._started = 0.0
        self.flags = [f"--gin_file={gin_file}", f"--workdir={workdir}",
                      *(f"--gin={line}" for line in (*BINDINGS, *bindings))]

    @property
    def log(self) -> pathlib.Path:
        return self.workdir.with_suffix(".log")

    def xla_flags(self, count: int) -> str:
        """Returns the setting that gives each of `count` processes its part of DEVICES devices."""
        return (f"{os.environ.get('XLA_FLAGS', '')} "
                f"--xla_force_host_platform_device_count={DEVICES // count} "
                "--xla_backend_optimization_level=0")  # most of the time is compilation

    def start(self, count: int) -> None:
        """Starts `count` processes that hold DEVICES devices together."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": self.xla_flags(count)}
        self._started = time.time()
        with self.log.open("a") as log:
            self.processes = [subprocess.Popen(
                [sys.executable, "-m", "launch.train", *self.flags], cwd=ROOT, stdout=log, stderr=log,
                env=environment | {"MOLMO2_HOSTS": f"localhost:{port},{count},{index}"})
                for index in range(count)]

    def finish(self) -> None:
        """Waits for the processes.

        Raises:
          RuntimeError: one of them failed; the message is the end of its log.
        """
        codes = self.wait()
        if any(codes):
            raise RuntimeError(f"all processes must end with 0; got {codes}\n{self.log.read_text()[-4000:]}")

    def close(self) -> None:
        """Kills the processes that are still running."""
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self) -> list[int]:
        """Returns the exit statuses; negative numbers are signals."""
        until = time.monotonic() + self._limit
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def kill(self, indices=None) -> None:
        """Sends SIGKILL to the processes, all by default, and waits until those are gone."""
        killed = self.processes if indices is None else [self.processes[index] for index in indices]
        for process in killed:
            process.kill()
        for process in killed:
            assert process.wait() == -signal.SIGKILL, self.log.read_text()[-4000:]

    def until(self, happens) -> None:
        """Waits until happens() is true.

        Raises:
          RuntimeError: a process ended before that.
        """
        limit = time.monotonic() + self._limit
        while not happens():
            if any(process.poll() is not None for process in self.processes) or time.monotonic() > limit:
                raise RuntimeError(f"the moment to kill never came\n{self.log.read_text()[-4000:]}")
            time.sleep(0.003)

    def is_saving(self, after: int) -> bool:
        """Returns whether a checkpoint after step `after` is being written, not left over from a kill."""
        with contextlib.suppress(FileNotFoundError):
            return any(int(path.name.split(".")[0]) > after and path.stat().st_mtime > self._started
                       for path in (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        return False

    def steps(self) -> int:
        """Returns the number of steps in the metrics."""
        path = self.workdir / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def saved(self) -> list[int]:
        names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def record(self) -> dict:
        """Returns all that must be equal: metrics without times, data positions, a sum of every array."""
        last = self.workdir / "checkpoints" / str(self.saved()[-1])
        lines = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        positions = {}
        for path in (last / "data").glob("process_*.json"):
            state = json.loads(path.read_text())
            positions |= json.loads(state["positions"])
        return {"metrics": [(line["step"], line["loss"], line["accuracy"], line["grad_norm_llm"])
                            for line in lines],
                "positions": dict(sorted(positions.items())),
                "sums": json.loads((last / "sums" / "metadata").read_text())}


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Writes a world of 20 clips and the gin file of a run of 24 steps over it, saved every third one."""
    sys.path.insert(0, str(ROOT))
    from tests.launch import test_train
    return test_train.write_world(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="an empty folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that any wait may take")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    bindings = (f"train.TrainConfig.steps = {24 + 12 * options.kills}",)  # no run may finish unkilled
    gin = draw(options.folder)
    alone, killed = (Run(gin, options.folder / name, bindings, options.limit) for name in ("alone", "killed"))
    try:
        alone.start(2)
        alone.finish()
        kill_often(killed, options.kills, random.Random(options.seed))
        killed.start(2)
        killed.finish()
    finally:
        alone.close()
        killed.close()
    wanted = alone.record()
    differing = [name for name, value in killed.record().items() if value != wanted[name]]
    print("equal in every bit" if not differing else f"DIFFERENT: {differing}")
    sys.exit(bool(differing))


def kill_often(killed: Run, kills: int, rng: random.Random) -> None:
    """Starts the run `kills` times, as 1, 2 or 4 processes, and kills it each time; prints each attempt."""
    print("processes  killed         at step  saved then")
    for _ in range(kills):
        count, during_save, one = rng.choice((1, 2, 4)), rng.random() < 0.5, rng.random() < 0.3
        at, base = killed.steps() + rng.randrange(1, 6), (killed.saved() or [0])[-1]
        killed.start(count)
        killed.until(lambda: killed.is_saving(base) if during_save else killed.steps() >= at)
        time.sleep(0 if during_save else rng.random() * 0.2)
        killed.kill([rng.randrange(count)] if one else None)
        killed.wait()
        print(f"{count:9}  {'one' if one else 'all':3} {'in a save' if during_save else 'anywhere':10} "
              f"{killed.steps():7}  {killed.saved()}", flush=True)


if __name__ == "__main__":
    main()
