"""Faults of the cloud during a long run: none ends a healthy job, and the reported reasons are true.

Faults are played by the stub cloud of test_tpu_run.py.
"""

import random
import signal

import pytest

from tests.launch.tpu import test_run as test_tpu_run

cloud = test_tpu_run.cloud
SERVICE = "1 ERROR: HttpError <503>: The service is currently unavailable."
SSH = "255 ssh: connect to host 10.0.0.2 port 22: Connection refused"
# Writes "began", at its end "trained", and "told" on SIGTERM, which no healthy machine may get.
JOB = ('trap \'echo x >>"$CLOUD/told"; exit 75\' TERM; echo x >>"$CLOUD/began"; '
       'until [[ -f "$CLOUD/ready" ]]; do sleep 0.05; done; echo line; echo x >>"$CLOUD/trained"')


@pytest.fixture(params=[2, 16])
def sized(request, cloud):
    """The cloud with two or sixteen machines per slice, and the flags of such a slice."""
    cloud.environment["WORKERS"] = str(request.param)
    return cloud, slice_of(request.param), request.param


def slice_of(machines):
    """Returns the flags of a slice of so many machines."""
    kind = {2: "v5p-16", 16: "v5p-128"}[machines]
    return [*test_tpu_run.WHERE, f"--type={kind}", "--version=v2"]


@pytest.fixture(params=[2, pytest.param(16, marks=pytest.mark.slow(10))])
def size(request, cloud):
    """The number of machines of the cloud's slices."""
    cloud.environment["WORKERS"] = str(request.param)
    return request.param


def count(cloud, name):
    path = cloud.folder / name
    return len(path.read_text().split()) if path.exists() else 0


def train(cloud, flags, *arguments, ready=True):
    if ready:
        (cloud.folder / "ready").touch()
    return cloud.run(*flags, *arguments, "--", "bash", "-c", JOB)


def check_trained(done, cloud, machines, starts=1):
    """The command succeeded on all machines of its last start, and none received SIGTERM."""
    assert done.returncode == 0, done.err
    assert machines <= count(cloud, "trained") <= starts * machines and not count(cloud, "told"), done.err


@pytest.mark.slow(6)
@pytest.mark.parametrize("call, fates", [
    ("scp", ["1 scp: Connection closed"]),
    ("describe", ["-", SERVICE, "1 ERROR: (gcloud) UNAVAILABLE: no", SERVICE]),
    ("delete", ["1 FAILED_PRECONDITION: the queued resource is SUSPENDING", SERVICE]),
    ("create", [SERVICE, "1 RESOURCE_EXHAUSTED: There is no more capacity in the zone"]),
    ("ssh", [SSH, SSH]), ("look", [SSH, SERVICE]), ("unpack", [SSH]), ("start", [SSH]),
    ("attach", [SSH, "1 ERROR: (gcloud) DEADLINE_EXCEEDED: no", "cut 20"]),
    ("tpu-vm_describe", [SERVICE, SERVICE])])
def test_what_the_cloud_cannot_say_or_do_now_is_asked_again(cloud, size, call, fates):
    cloud.fails(call, *fates)
    check_trained(train(cloud, slice_of(size), "--spot", "--delete"), cloud, size)
    assert not (cloud.folder / "states").exists()  # no resource remains


@pytest.mark.slow(6)
@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("call", ["scp", "unpack", "start", "attach"])
def test_machines_taken_away_at_any_moment_are_asked_for_again(cloud, size, call, lag):
    cloud.fails(call, f"preempt {lag}")
    check_trained(train(cloud, slice_of(size), "--spot"), cloud, size, starts=2)
    assert len(cloud.calls("queued-resources create")) == 2


def test_a_failed_look_at_a_node_whose_connection_broke_stops_no_healthy_pod(sized):
    cloud, flags, machines = sized
    cloud.fails("attach", *[SSH] * machines, SSH)
    cloud.fails("tpu-vm_describe", "-", *[SERVICE] * machines, "1", SERVICE)
    check_trained(train(cloud, flags), cloud, machines)
    assert "lost" not in cloud.run("status", *test_tpu_run.WHERE).err


def test_a_machine_without_network_follows_the_job_when_it_has_one_again(sized):
    cloud, flags, machines = sized
    process = cloud.start(*flags, "--", "bash", "-c", JOB)
    test_tpu_run.wait_for(
        lambda: count(cloud, "began") == machines and len(cloud.calls("attach")) >= machines)
    broken = "1 ERROR: gcloud crashed (ConnectionError): Failed to establish a new connection"
    for call in ("attach", "describe", "tpu-vm_describe"):
        cloud.fails(call, *[broken] * machines)
    (cloud.folder / "ready").touch()
    process.out, process.err = process.communicate(timeout=90)
    check_trained(process, cloud, machines)


@pytest.mark.parametrize("fates", [
    ["retry 30", "-"], ["retry 150", "-"], ["cut 60", "255 ssh: connection reset", "cut 130", "cut 10"]])
def test_a_broken_connection_is_made_again_and_no_line_is_lost_or_repeated(cloud, size, fates):
    cloud.fails("attach", *fates * (size // 2))   # as many broken connections per machine
    shell = 'for i in 1 2 1 2 3 4; do echo "line $i"; echo; echo same; done; printf "no end"'
    done = cloud.run(*slice_of(size), "--", "bash", "-c", shell)
    assert done.returncode == 0, done.err
    wanted = [text for i in (1, 2, 1, 2, 3, 4) for text in (f"line {i}", "", "same")] + ["no end"]
    for worker in range(size):
        shown = [line for line in done.out.splitlines() if line.startswith(f"[job/{worker}]")]
        assert [line.partition(" ")[2] for line in shown] == wanted
        log = cloud.folder / "runs" / "logs" / "job" / f"job-{worker}.log"
        assert log.read_text() == "".join(f"{text}\n" for text in wanted[:-1]) + "no end"


@pytest.mark.slow(6)
def test_a_command_that_fails_while_the_cloud_says_nothing_has_its_own_status(sized):
    cloud, flags, machines = sized
    cloud.environment["TPU_RUN_PATIENCE_SECONDS"] = "1"
    (cloud.folder / "faults").mkdir()
    silent = f'yes "{SERVICE}" | head -n 9999 >"$CLOUD/faults/describe"'
    done = cloud.run(*flags, "--", "bash", "-c", f"[[ $WORKER != 1 ]] || {{ {silent}; exit 3; }}; {JOB}")
    assert done.returncode == 3 and "the command failed with status 3" in done.err
    assert "were lost" not in done.err
    assert "the slice job still exists" in done.err


@pytest.mark.parametrize("spot", [[], ["--spot"]])
@pytest.mark.parametrize("word", ["stop", "delete"])
def test_a_request_that_waits_is_taken_back_by_stop_and_delete_and_the_script_ends(cloud, word, spot):
    cloud.environment["STATES"] = "WAITING_FOR_RESOURCES"
    process = cloud.start(*test_tpu_run.SLICE, *spot, "--", "bash", "-c", JOB)
    test_tpu_run.wait_for(lambda: (cloud.folder / "states").exists())
    done = cloud.run(word, *test_tpu_run.WHERE, "--logs=elsewhere")  # as from another machine
    _, error = process.communicate(timeout=60)
    assert done.returncode == 0, done.err
    assert process.returncode == 1 and "deleted by another" in error
    assert len(cloud.calls("queued-resources create")) == 1 and not (cloud.folder / "states").exists()


def test_delete_ends_a_script_that_follows_the_job_and_nothing_is_asked_for_again(cloud):
    process = cloud.start(*test_tpu_run.SLICE, "--spot", "--", "bash", "-c", JOB)
    test_tpu_run.wait_for(lambda: count(cloud, "began") == 2)
    assert cloud.run("delete", *test_tpu_run.WHERE).returncode == 0
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and ("deleted by another" in error or "stopped by hand" in error)
    assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.parametrize("change, words", [
    (["--env=x=1", "--", "bash", "-c", JOB], "another command runs as job: env MOLMO2_HOSTS=auto bash -c"),
    (["--", "bash", "-c", "true"], "another command runs as job: env MOLMO2_HOSTS=auto bash -c")])
@pytest.mark.slow(6)
def test_a_name_whose_command_runs_takes_no_other(sized, change, words):
    cloud, flags, machines = sized
    process = cloud.start(*flags, "--", "bash", "-c", JOB)
    test_tpu_run.wait_for(
        lambda: count(cloud, "began") == machines and len(cloud.calls("attach")) >= machines)
    second = cloud.run(*flags, "--logs=elsewhere", *change)
    assert second.returncode == 1 and words in second.err and "tpu_run.sh stop --name=job" in second.err
    (cloud.code / "new.py").write_text("")
    third = cloud.run(*flags, "--logs=elsewhere", "--", "bash", "-c", JOB)
    assert third.returncode == 1 and "the same command runs with other code" in third.err
    assert not list(cloud.folder.glob("machines/job/*/job/code/new.py"))  # nor is its code replaced
    (cloud.folder / "ready").touch()
    process.out, process.err = process.communicate(timeout=60)
    check_trained(process, cloud, machines)


@pytest.mark.parametrize("logs", [[], ["--logs=elsewhere"]])
def test_a_name_whose_slice_exists_takes_no_other_type(cloud, size, logs):
    kind, other = slice_of(size)[-2].partition("=")[2], "v5p-32"
    gcloud = cloud.folder / "bin" / "gcloud"
    gcloud.write_text(gcloud.read_text().replace("then echo READY; else", f"then echo READY {kind}; else"))
    check_trained(train(cloud, slice_of(size)), cloud, size)
    done = cloud.run(*test_tpu_run.WHERE, f"--type={other}", "--version=v2", *logs, "--", "true")
    assert done.returncode == 1 and "use another --name" in done.err
    assert kind in done.err and other in done.err


@pytest.mark.slow(6)
def test_machines_that_keep_a_wrong_state_are_given_back_in_the_end(cloud):
    """The queued resource stays ACTIVE although its nodes are gone."""
    cloud.fails("attach", "preempt 500")
    check_trained(train(cloud, test_tpu_run.SLICE, "--spot"), cloud, 2, starts=2)
    assert len(cloud.calls("queued-resources create")) == 2


# What ends a run


@pytest.mark.parametrize("call, text, words", [
    ("create", "PERMISSION_DENIED: tpu.nodes.create", "was refused: PERMISSION_DENIED: tpu.nodes.create"),
    ("create", "RESOURCE_EXHAUSTED: Quota limit 'X' exceeded", "has no quota for 1 x v5p-16 in here-a: RESO"),
    ("describe", "ERROR: (gcloud) your login has expired", "your login has expired"),
    ("attach", "ERROR: (gcloud) your login has expired", "your login has expired")])
def test_a_clear_refusal_ends_the_script_and_not_the_job(cloud, call, text, words):
    cloud.fails(call, *[f"1 {text}"] * 3)
    done = train(cloud, test_tpu_run.SLICE, "--spot", ready=False)
    assert done.returncode == 1 and words in done.err.splitlines()[-1] and not count(cloud, "told")
    assert ("the slice job still exists" in done.err) == (cloud.folder / "states").exists()


def test_the_reason_of_a_failed_request_is_shown_and_requests_end(cloud):
    cloud.environment["STATES"] = "FAILED"
    (cloud.folder / "reason").write_text("the reservation has no such machines\n")
    done = train(cloud, test_tpu_run.SLICE)
    assert done.returncode == 1 and "no such machines" in done.err.splitlines()[-1]
    assert len(cloud.calls("queued-resources create")) == 4
    done = train(cloud, test_tpu_run.SLICE, "--valid_until=2h")
    assert done.returncode == 1 and "--valid-until-duration=2h" in cloud.calls("create")[-1]
    assert len(cloud.calls("queued-resources create")) == 5  # its time limit has passed: not requested again


def test_a_setup_that_fails_is_tried_again_and_then_told(cloud):
    setup = '--setup=echo x >>"$HOME/setups"; test $(wc -l <"$HOME/setups") = 2'
    check_trained(train(cloud, test_tpu_run.SLICE, setup), cloud, 2)
    done = train(cloud, test_tpu_run.SLICE, "--setup=echo no disk >&2; exit 9")
    last = done.err.splitlines()[-1]
    assert done.returncode == 1 and "--setup on job failed with status 9: no disk" in last


def test_an_ended_script_says_what_becomes_of_the_request(cloud):
    cloud.environment["STATES"] = "WAITING_FOR_RESOURCES"
    process = cloud.start(*test_tpu_run.SLICE, "--", "bash", "-c", JOB)
    test_tpu_run.wait_for(lambda: (cloud.folder / "states").exists())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "its request for the slice remains" in error
    assert (cloud.folder / "states").exists()


# Flags


def test_flags_of_the_slice_and_of_ssh_are_passed_on(cloud):
    flags = ["--network=n", "--subnetwork=s", "--internal_ips", "--service_account=a@b", "--reserved",
             "--labels=k=v", "--data_disk=source=d,mode=read-only", "--create_flag=--tags=t",
             "--ssh_flag=-oProxyCommand=x y"]
    check_trained(train(cloud, test_tpu_run.SLICE, *flags), cloud, 2)
    [create] = cloud.calls("queued-resources create")
    for flag in ("--network=n", "--subnetwork=s", "--internal-ips", "--service-account=a@b", "--reserved",
                 "--labels=k=v", "--data-disk=source=d,mode=read-only", "--tags=t"):
        assert flag in create
    assert "--spot" not in create
    assert all("--internal-ip" in call and "-oProxyCommand=x y" in call
               for call in cloud.calls("tpu-vm ssh") + cloud.calls("tpu-vm scp"))
    cloud.run("status", "--name=job")  # the record says how machines are reached
    assert "--internal-ip" in cloud.calls("tpu-vm ssh")[-1]


def test_a_tunnel_is_that_of_queued_resources(cloud):
    done = cloud.run(*test_tpu_run.SLICE, "--slices=2", "--iap", "--dry_run", "--", "true")
    lines = [line for line in done.out.splitlines() if " ssh " in line or " scp " in line]
    assert lines and all("queued-resources s" in line and "--tunnel-through-iap" in line for line in lines)
    assert any("--node=1" in line and "job:job/" in line for line in lines if " scp " in line)


def test_machines_beyond_64_are_reached_in_batches_and_watched_without_their_output(cloud):
    done = cloud.run(*test_tpu_run.WHERE, "--type=v5p-1024", "--version=v2", "--dry_run", "--", "true")
    assert "--worker=0-63" in done.out and "--worker=64-127" in done.out and "--worker=all" not in done.out
    assert done.out.count("tpu_worker.sh attach") == 64 and "tpu_worker.sh poll" in done.out


def test_machines_whose_output_is_not_shown_are_watched(cloud):
    """With a limit of one shown machine, the failure of the second one is still noticed."""
    cloud.environment["WORKERS"] = "3"
    follow = cloud.code / "launch/tpu/follow.py"
    follow.write_text(follow.read_text().replace("_SHOWN = 64", "_SHOWN = 1"))
    shell = 'if [[ $WORKER == 1 ]]; then echo broken; exit 3; fi; ' + JOB
    done = cloud.run(*test_tpu_run.SLICE, "--", "bash", "-c", shell)
    assert done.returncode == 3 and "broken" in done.out, done.err
    assert "job/1 ended with status 3" in done.err


# Anything at any time


FATES = {
    "create": [SERVICE, "1 no more capacity", "1 strange"], "describe": [SERVICE, "1 strange", "1 "],
    "delete": ["1 FAILED_PRECONDITION: not now", SERVICE], "tpu-vm_describe": [SERVICE, "1 strange"],
    "scp": [SSH, SERVICE, "preempt 0", "preempt 3"], "ssh": [SSH, SERVICE],
    "look": [SSH, SERVICE, "preempt 1"], "unpack": [SSH, "preempt 0", "1 strange"],
    "start": [SSH, "preempt 2"],
    "attach": [SSH, "1 strange", "cut 9", "cut 70", "retry 40", "retry 80", "preempt 0", "preempt 5"]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_after_any_failures_the_job_is_trained_and_nothing_is_left(seed, cloud):
    rng, machines = random.Random(seed), 16 if seed % 10 == 9 else 2
    cloud.environment["WORKERS"] = str(machines)
    planned = {call: [rng.choice([*fates, "-", "-"]) for _ in range(rng.randrange(4))]
               for call, fates in FATES.items()}
    for call, fates in planned.items():
        cloud.fails(call, *fates)
    done = train(cloud, slice_of(machines), "--spot", "--delete")
    preemptions = sum("preempt" in fate for fates in planned.values() for fate in fates)
    check_trained(done, cloud, machines, starts=1 + preemptions)
    assert not (cloud.folder / "states").exists() and not (cloud.folder / "machines").exists()
    shown = [line for line in done.out.splitlines() if line == "[job/0] line"]
    assert 1 <= len(shown) <= 1 + preemptions


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_after_a_clear_refusal_at_any_time_no_slice_is_left_that_nobody_was_told_of(seed, cloud):
    rng = random.Random(seed)
    call = rng.choice(list(FATES))
    before = [rng.choice([SERVICE, "-"]) for _ in range(rng.randrange(3))]
    cloud.fails(call, *before, *["1 ERROR: (gcloud) PERMISSION_DENIED: not you"] * 9)
    ready = rng.random() < 0.5 or call != "attach"
    done = train(cloud, test_tpu_run.SLICE, "--spot", "--delete", ready=ready)
    assert not count(cloud, "told")
    if (cloud.folder / "states").exists():
        assert done.returncode == 1 and "not you" in done.err.splitlines()[-1]
        assert "tpu_run.sh delete --name=job" in done.err
