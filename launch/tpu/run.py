"""The implementation of tpu_run.sh, whose header comment is the help. Standard library only."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading

from launch.tpu import cloud as tpu_cloud
from launch.tpu import flags as tpu_flags
from launch.tpu import follow as tpu_follow
from launch.tpu import gke as tpu_gke
from launch.tpu import job as tpu_job


def run_on_gke(options: tpu_flags.Options, caller: tpu_cloud.Caller) -> int:
    """Carries out the action on the JobSet; returns the exit status."""
    folder = tpu_flags.Folder(options)
    job = tpu_gke.Job(name=options.name)
    if options.action == "run":
        tpu_flags.require(options, "type", "image")
        found = tpu_flags.read_type(options)
        job = tpu_gke.Job(
            name=options.name, gke=found.chip.gke, type=found.cloud_name, topology=found.topology,
            hosts=found.hosts, chips_per_host=found.chips // found.hosts, slices=int(options.slices or 1),
            is_spot=bool(options.spot),
            retries=int(options.retries), image=options.image, claim=options.claim, command=options.command,
            service_account=options.service_account, environment=options.env,
            labels=options.labels.split(",") if options.labels else ())
    cluster = tpu_gke.Cluster(job, caller, bool(options.dry_run))
    if options.action == "run":
        cluster.run()
        folder.remember(options)
        return 0
    if options.action == "delete":
        cluster.delete()
        folder.forget()
    return (dict(status=cluster.status, logs=cluster.logs, stop=cluster.stop).get(options.action, int)()) or 0


def run_local(options: tpu_flags.Options, caller: tpu_cloud.Caller, stopping: threading.Event) -> int:
    """Runs processes on this machine, joined by jax.distributed; returns the status of tpu_follow.watch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = "PORT" if options.dry_run else free.getsockname()[1]
    processes, members = [], {}
    for i in range(int(options.local)):
        extra = [*options.env, f"MOLMO2_HOSTS=localhost:{port},{options.local},{i}"]
        if options.dry_run:
            tpu_cloud.show(tpu_cloud.quoted(["env", *extra, *options.command]))
            continue
        process = subprocess.Popen(["env", *extra, *options.command], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        members[f"process {i}"] = lambda process=process, i=i: _member(process, i)

    def give_up(times):
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if times == 1 else signal.SIGKILL)

    return tpu_follow.watch(members, give_up, stopping.is_set, float(os.environ.get("STOP_SECONDS", 60)))


def _member(process: subprocess.Popen, number: int) -> int:
    """Prints the output of a process and returns its status, 128 + N if signal N ended it."""
    def copy(pipe, stream):
        for line in pipe:
            text = line.decode(errors="replace").rstrip("\n")
            with tpu_cloud.printing:
                print(f"[{number}] {text}", file=stream, flush=True)

    threads = [threading.Thread(target=copy, args=pair, daemon=True)
               for pair in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))]
    for thread in threads:
        thread.start()
    status = process.wait()
    for thread in threads:
        thread.join(5)  # a child that it left running may keep its output open
    return status if status >= 0 else 128 - status


def _main(options: tpu_flags.Options, caller: tpu_cloud.Caller) -> int:
    if options.local:
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        return run_local(options, caller, stopping)

    def end(*_):
        raise tpu_cloud.Ended

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    tpu_flags.require(options, "name")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,30}[a-z0-9])?", options.name):
        tpu_flags.fail("--name must be at most 32 lower-case letters, digits and dashes; got "
                       f"{options.name}")
    if options.action != "run":
        tpu_flags.Folder(options).recall(options)
    if options.jobset:
        return run_on_gke(options, caller)
    if options.action != "run":
        return tpu_job.do_word(options, caller)
    with tempfile.TemporaryDirectory() as temporary:
        return tpu_job.run_on_tpu(options, caller, pathlib.Path(temporary))


def main() -> None:
    """Carries out the command line and exits."""
    caller = tpu_cloud.Caller(tpu_cloud.Pace.of_environment())
    try:
        status = _main(tpu_flags.parse(sys.argv[1:]), caller)
    except tpu_cloud.Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        status = 1
    except tpu_cloud.Ended:
        status = 130
    finally:
        caller.end()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads that read from ended commands
