"""launch/tpu_worker.sh on a machine: signals, lock files, and the files of an earlier job."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
CHILD = 'trap "echo x >>child_told" TERM; touch child; while true; do sleep 0.05; done'


class Machine:
    """A home folder with the script and a folder of code."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "code").mkdir(parents=True)
        (folder / "code.hash").write_text("abc\n")
        shutil.copy(ROOT / "launch" / "tpu_worker.sh", folder)
        self.environment = os.environ | {"STOP_SECONDS": "60", "RETRY_SECONDS": "0",
                                         "LIBTPU_LOCKFILE": str(folder / "lock")}

    def run(self, *words):
        done = subprocess.run(["bash", str(self.folder / "tpu_worker.sh"), *words], env=self.environment,
                              text=True, capture_output=True, timeout=120, check=False)
        *lines, mark = done.stdout.splitlines()
        assert mark == f"== {words[0]} ended with status {done.returncode}"
        return "\n".join(lines)

    def start(self, shell, wait=()):
        self.run("start", "bash", "-c", shell)
        until = time.monotonic() + 60
        while not all((self.folder / "code" / name).exists() for name in wait):
            assert time.monotonic() < until
            time.sleep(0.02)

    def has(self, name):
        return (self.folder / "code" / name).exists()


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path / "home")
    yield made
    with contextlib.suppress(OSError, ValueError):
        os.killpg(int((made.folder / "job" / "pid").read_text()), signal.SIGKILL)


def test_stop_is_for_the_command_alone_which_still_has_its_workers_when_it_saves(machine):
    machine.start(f"bash -c '{CHILD}' & child=$!; "
                  "trap '[[ ! -f child_told ]] && kill -0 $child && touch saved; kill -KILL $child; exit 75' "
                  "TERM; touch up; while true; do sleep 0.05; done", wait=["child", "up"])
    assert machine.run("stop") == "stopped"
    assert machine.has("saved") and not machine.has("child_told") and machine.run("status") == "ended 75"


def test_what_a_shell_started_and_did_not_wait_for_is_told_next(machine):
    inner = 'trap "touch saved; exit 75" TERM; touch up; while true; do sleep 0.05; done'
    machine.start(f"bash -c '{inner}'; true", wait=["up"])
    assert machine.run("stop") == "stopped" and machine.has("saved")


def test_what_does_not_end_is_killed_with_all_its_processes(machine):
    machine.environment["STOP_SECONDS"] = "1"
    machine.start(f"bash -c '{CHILD}' & trap : TERM; while true; do sleep 0.05; done", wait=["child"])
    group = int((machine.folder / "job" / "pid").read_text())
    assert machine.run("stop") == "killed" and machine.run("status") == "ended 137"
    assert subprocess.run(["pgrep", "-g", str(group), "-r", "R,S,D"], check=False).returncode == 1


def test_start_ends_what_an_earlier_job_left(machine):
    machine.start(f"setsid true; bash -c '{CHILD}' >/dev/null & until [[ -f child ]]; do sleep 0.05; done",
                  wait=["child"])
    group = int((machine.folder / "job" / "pid").read_text())
    until = time.monotonic() + 60
    while machine.run("status") == "running":
        assert time.monotonic() < until
    assert subprocess.run(["pgrep", "-g", str(group)], check=False).returncode == 0
    machine.start("true")
    assert subprocess.run(["pgrep", "-g", str(group), "-r", "R,S,D"], check=False).returncode == 1


def test_a_job_that_was_stopped_by_hand_before_it_began_does_not_begin(machine):
    assert machine.run("look", "new") == "nothing"
    machine.run("stop", "by_hand")
    assert "was stopped before it began" in machine.run("start", "true")
    machine.run("look", "new")
    assert machine.run("start", "true") == "the job has started"


def test_a_stale_lock_of_the_tpu_is_removed_and_a_held_one_stays(machine):
    lock = machine.folder / "lock"
    with open(lock, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert "another process uses the TPU" in machine.run("start", "true") and lock.exists()
    until = time.monotonic() + 60
    while machine.run("status") == "running":
        assert time.monotonic() < until
    machine.run("start", "true")
    assert not lock.exists()


def test_an_installation_waits_for_the_locks_of_apt(machine, tmp_path):
    """A machine that has only Python 3.10 and is still updating itself."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "tar", "gzip", "cut", "sort", "rm", "mkdir", "dirname", "cat", "sleep", "grep"):
        (commands / name).symlink_to(shutil.which(name))
    (commands / "sudo").write_text("""#!/bin/bash
echo "$*" >>"$HOME/sudo"
case "$*" in
  *install*) (($(grep -c install "$HOME/sudo") > 2)) || { echo "Could not get lock" >&2; exit 100; } ;;
esac
""")
    (commands / "sudo").chmod(0o755)
    launch = tmp_path / "new" / "launch"
    launch.mkdir(parents=True)
    (launch / "environment.sh").write_text('install() { echo "$1" >>"$HOME/installed"; }\n')
    archive = str(machine.folder / "code.tar.gz")
    subprocess.run(["tar", "-czf", archive, "-C", str(tmp_path / "new"), "launch"], check=True)
    machine.environment |= {"PATH": str(commands), "HOME": str(tmp_path)}
    machine.run("unpack", archive, "def")
    asked = (tmp_path / "sudo").read_text().splitlines()
    assert sum("install" in line for line in asked) == 3
    assert all("DPkg::Lock::Timeout=600" in line for line in asked if "apt-get" in line)
    assert (tmp_path / "installed").read_text() == "tpu\n"
    assert (machine.folder / "code.hash").read_text() == "def\n"
    assert machine.run("unpack", archive, "def") == "code is up to date"
