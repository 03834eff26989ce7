"""The same job as a JobSet on Google Kubernetes Engine, whose controllers restart it."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Sequence

from launch.tpu import cloud as tpu_cloud
from launch.tpu import follow as tpu_follow

_IDENTITY = "molmo2-jax/identity"
_SPOT_RESTARTS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The contents of a JobSet. claim: "CLAIM:FOLDER" of a disk that all machines share, or ""."""
    name: str
    gke: str = ""
    type: str = ""
    topology: str = ""
    hosts: int = 0
    chips_per_host: int = 0
    slices: int = 1
    is_spot: bool = False
    retries: int = 0
    image: str = ""
    claim: str = ""
    service_account: str = ""
    labels: Sequence[str] = ()
    environment: Sequence[str] = ()
    command: Sequence[str] = ()


def manifest(job: Job) -> str:
    """Returns the JobSet as YAML.

    A pod that ends with status 75 has saved: its job fails by the pod failure policy, and all are restarted.
    Any other failure counts towards maxRestarts; GKE does not distinguish a lost machine from a failing
    command.
    """
    text = _manifest(job)
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    return text.replace("  annotations:\n", f"  annotations:\n    {_IDENTITY}: \"{identity}\"\n", 1)


def _manifest(job: Job) -> str:
    claim, _, folder = job.claim.partition(":")
    pairs = [label.partition("=")[::2] for label in job.labels]
    labels = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in pairs)
    environment = "".join(f"                    - {{name: {name}, value: {json.dumps(value)}}}\n"
                          for name, _, value in (one.partition("=") for one in job.environment))
    spot = '                cloud.google.com/gke-spot: "true"\n' if job.is_spot else ""
    account = f"              serviceAccountName: {job.service_account}\n" if job.service_account else ""
    mount = f"                    - {{name: disk, mountPath: {json.dumps(folder)}}}\n" if claim else ""
    volume = f"{' ' * 16}- {{name: disk, persistentVolumeClaim: {{claimName: {claim}}}}}\n" if claim else ""
    saved = f"{{containerName: worker, operator: In, values: [{tpu_follow.AGAIN}]}}"
    return f"""apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {job.name}
{f"  labels:{chr(10)}{labels}" if labels else ""}  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {_SPOT_RESTARTS if job.is_spot else job.retries}
    rules:
      - {{name: saved, action: RestartJobSetAndIgnoreMaxRestarts, onJobFailureReasons: [PodFailurePolicy]}}
  replicatedJobs:
    - name: slice
      replicas: {job.slices}   # of {job.type}: {job.topology}
      template:
        spec:
          parallelism: {job.hosts}
          completions: {job.hosts}
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - {{action: FailJob, onExitCodes: {saved}}}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
{account}              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {job.gke}
                cloud.google.com/gke-tpu-topology: {job.topology}
{spot}              containers:
                - name: worker
                  image: {job.image}
                  command: {json.dumps(list(job.command))}
                  env:
                    - {{name: MOLMO2_HOSTS, value: auto}}
{environment}                  resources:
                    limits:
                      google.com/tpu: {job.chips_per_host}
                  volumeMounts:
                    - {{name: shm, mountPath: /dev/shm}}   # data workers pass arrays through it
{mount}              volumes:
                - {{name: shm, emptyDir: {{medium: Memory}}}}
{volume}"""


class Cluster:
    """A JobSet in the cluster that kubectl is configured for."""

    def __init__(self, job: Job, caller: tpu_cloud.Caller, dry: bool = False):
        self._job, self._caller, self._dry = job, caller, dry
        self._selector = f"jobset.sigs.k8s.io/jobset-name={job.name}"

    def _call(self, what: str, *words: str, text: str | None = None) -> str:
        if self._dry:
            tpu_cloud.show(tpu_cloud.quoted(["kubectl", *words]))
            return ""
        answer = self._caller.ask(["kubectl", *words], what, text=text)
        if answer.status:
            raise tpu_cloud.Problem(f"{what} failed: {answer.sentence}")
        return answer.out

    def state(self) -> tuple[str, str]:
        """Returns the JobSet's state and the identity it was applied with.

        The state is "absent", "running", "stopped", "completed" or "failed".
        """
        text = self._call(f"the status check of the JobSet {self._job.name}", "get", "jobset", self._job.name,
                          "--ignore-not-found", "--output=json")
        if not text.strip():
            return "absent", ""
        found = json.loads(text)
        identity = found["metadata"].get("annotations", {}).get(_IDENTITY, "")
        for one in found.get("status", {}).get("conditions", ()):
            if one["status"] == "True" and one["type"] in ("Completed", "Failed"):
                return one["type"].lower(), identity
        return ("stopped" if found["spec"].get("suspend") else "running"), identity

    def run(self) -> None:
        """Applies the JobSet; resumes it if it was stopped; replaces one that has ended.

        Raises:
          tpu_cloud.Problem: another job runs under this name, or the cluster refused a call.
        """
        text, name = manifest(self._job), self._job.name
        if self._dry:
            tpu_cloud.show(text.rstrip("\n"))
            return
        state, identity = self.state()
        is_same = f"{_IDENTITY}: \"{identity}\"" in text
        if state == "running":
            if not is_same:
                raise tpu_cloud.Problem(f"the JobSet {name} runs another job; \"tpu_run.sh logs\" follows "
                                        "it, \"tpu_run.sh stop\" lets it save and end")
            tpu_cloud.say(f"the JobSet {name} runs already; logs follows it")
            return
        if state == "stopped" and is_same:
            self._suspend(False)
            tpu_cloud.say(f"the JobSet {name} resumes")
            return
        if state != "absent":  # the command of a JobSet cannot be changed
            tpu_cloud.say(f"the JobSet {name} is {state}; replacing it")
            self.delete()
        self._call(f"the JobSet {name}", "apply", "--filename=-", text=text)
        tpu_cloud.say(f"the JobSet {name} was applied; logs follows it")

    def _suspend(self, value: bool) -> None:
        self._call(f"a change of the JobSet {self._job.name}", "patch", "jobset", self._job.name,
                   "--type=merge", "--patch=" + json.dumps({"spec": {"suspend": value}}))

    def stop(self) -> None:
        """Ends the pods, which save; the JobSet remains and can be resumed."""
        if not self._dry and self.state()[0] != "running":
            tpu_cloud.say(f"the JobSet {self._job.name} does not run")
            return
        self._suspend(True)

    def delete(self) -> None:
        """Deletes the JobSet with its pods and returns when they are gone."""
        self._call(f"the deletion of the JobSet {self._job.name}", "delete", "jobset", self._job.name,
                   "--ignore-not-found", "--wait")

    def status(self) -> None:
        """Prints the state and the pods."""
        if not self._dry:
            tpu_cloud.say(f"JobSet {self._job.name}: {self.state()[0]}")
        out = self._call("the status check of the pods", "get", "pods", f"--selector={self._selector}",
                         "--output=wide")
        if out:
            tpu_cloud.show(out.rstrip("\n"))

    def logs(self) -> int:
        """Prints the output of all pods, including later ones; returns 0 if the job completed, else 1.

        Raises:
          tpu_cloud.Problem: there is no such job.
        """
        words = ["kubectl", "logs", "--follow", "--prefix", "--max-log-requests=1024", "--ignore-errors",
                 f"--selector={self._selector}"]
        if self._dry:
            tpu_cloud.show(tpu_cloud.quoted(words))
            return 0
        since, pauses = ["--tail=-1"], self._caller.pace.pauses()
        while True:
            state, _ = self.state()
            if state == "absent":
                raise tpu_cloud.Problem(f"there is no JobSet {self._job.name}")
            answer = self._caller.run([*words, *since], on_line=tpu_cloud.show)
            since = [f"--since-time={datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"]
            if state != "running":
                tpu_cloud.say(f"JobSet {self._job.name}: {state}")
                return int(state != "completed")
            if answer.out:
                pauses = self._caller.pace.pauses()
            self._caller.wait(next(pauses))
