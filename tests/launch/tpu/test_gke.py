"""A JobSet is applied, followed, stopped, resumed and replaced according to its state."""

import json

import pytest

from tests.launch.tpu import test_run as test_tpu_run

cloud = test_tpu_run.cloud
JOB = ["--name=job", "--type=v5p-16", "--jobset", "--image=reg/img:1"]
COMMAND = ["--", "python", "-m", "launch.train"]


def exists(cloud, condition=None, suspend=False, identity=None):
    """Puts the JobSet of JOB and COMMAND into the cluster, in a given state."""
    yaml = pytest.importorskip("yaml")
    shown = yaml.safe_load(cloud.run("--dry_run", *JOB, *COMMAND).out)
    annotations = shown["metadata"]["annotations"] | ({"molmo2-jax/identity": identity} if identity else {})
    (cloud.folder / "jobset.json").write_text(json.dumps({
        "metadata": {"annotations": annotations}, "spec": {"suspend": suspend},
        "status": {"conditions": [{"type": condition, "status": "True"}] if condition else []}}))


def verbs(cloud):
    return [call.split()[0] for call in cloud.calls()]


def test_a_job_that_runs_is_left_alone_and_another_one_is_refused(cloud):
    exists(cloud)
    same = cloud.run(*JOB, *COMMAND)
    assert same.returncode == 0 and "runs already" in same.err and verbs(cloud) == ["get"]
    other = cloud.run(*JOB, "--", "python", "-m", "launch.evaluate")
    assert other.returncode == 1 and "runs another job" in other.err and "apply" not in verbs(cloud)


def test_stop_suspends_and_the_same_call_resumes(cloud):
    exists(cloud)
    assert cloud.run("stop", "--name=job", "--jobset").returncode == 0
    assert cloud.calls("patch") == ['patch jobset job --type=merge --patch={"spec": {"suspend": true}}']
    exists(cloud, suspend=True)
    assert cloud.run(*JOB, *COMMAND).returncode == 0
    assert cloud.calls("patch")[1:] == ['patch jobset job --type=merge --patch={"spec": {"suspend": false}}']
    assert "apply" not in verbs(cloud)


@pytest.mark.parametrize("state", [
    dict(condition="Completed"), dict(condition="Failed"), dict(suspend=True, identity="another")])
def test_a_job_that_does_not_run_is_replaced(cloud, state):
    exists(cloud, **state)
    assert cloud.run(*JOB, *COMMAND).returncode == 0
    assert verbs(cloud) == ["get", "delete", "apply"]


def test_status_and_logs_say_how_the_job_ended(cloud):
    exists(cloud, condition="Failed")
    status = cloud.run("status", "--name=job", "--jobset")
    assert status.returncode == 0 and "JobSet job: failed" in status.err and "Running" in status.out
    logs = cloud.run("logs", "--name=job", "--jobset")
    assert logs.returncode == 1 and "step 1" in logs.out
    exists(cloud, condition="Completed")
    assert cloud.run("logs", "--name=job", "--jobset").returncode == 0
    (cloud.folder / "jobset.json").unlink()
    assert "there is no JobSet job" in cloud.run("logs", "--name=job", "--jobset").err


def test_flags_of_queued_resources_are_refused(cloud):
    done = cloud.run(*JOB, "--network=mine", *COMMAND)
    assert done.returncode == 1 and "a JobSet takes no --network" in done.err


def test_an_account_and_labels_are_in_the_manifest(cloud):
    yaml = pytest.importorskip("yaml")
    flags = ["--labels=team=a,run=b", "--service_account=me"]
    shown = yaml.safe_load(cloud.run("--dry_run", *JOB, *flags, *COMMAND).out)
    assert shown["metadata"]["labels"] == {"team": "a", "run": "b"}
    pod = shown["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "me"
