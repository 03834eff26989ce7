#!/usr/bin/env bash
# Runs a command on every machine of a TPU slice, and brings it to its end.
#
#   launch/tpu_run.sh --name=sft --type=v5p-256 --zone=us-east5-a --project=mine --version=v2-alpha-tpuv5 \
#       --setup='MOUNT /mnt/disk && ln -sfn /mnt/disk/data /mnt/disk/pretrained .' \
#       -- python -m launch.train --gin_file=gin_configs/runs/sft_8b.gin --workdir=/mnt/disk/sft \
#          --init_from=/mnt/disk/pretrain
#   launch/tpu_run.sh status|logs|stop|delete --name=sft
#
# Creates the slice as a queued resource, waits for it, copies the code of this folder, installs it, starts the
# command on all machines and prints their output, each line behind the machine it came from. The command goes on
# if this script or its connection ends; calling the script again goes on wherever it stopped. A command that ends
# with status 75 has saved and wants to be started again, as launch.train does upon SIGTERM: that is done at once,
# and is no failure.
#
# Copied is what git tracks or would add, to ~/NAME/code of every machine, where the command runs. Not copied is
# what .gitignore names (data/, pretrained/, hf/, runs/, .venv/) and every linked folder: what the command reads
# and writes must lie on a disk that all machines share. docs/pods.md tells more.
#
# To run, with defaults in brackets:
#   --name, --zone, --project, --version    needed; the version is the machines' image, such as v2-alpha-tpuv5
#   --type           needed; the cloud's name of a slice: v5p-256 has 128 chips
#   --slices=N       several slices, joined over the data centre network (1)
#   --spot           machines that may be taken away; the slice is then asked for again and the command repeated
#   --setup=LINE     shell line for every machine, in ~/NAME/code, before each start: mounts disks, makes links
#   --env=NAME=VALUE for the command; may be repeated
#   --retries=N      how often a command that fails on healthy machines is started again (0)
#   --delete         deletes the slice when the command has ended well
#   --logs=FOLDER    where output is kept (runs/logs)
#   --dry_run        prints the commands for the cloud instead
#   --local=N        N processes on this machine instead, joined by jax.distributed; needs none of the above
#   --jobset         the same job as a JobSet for GKE, applied with kubectl; needs --name, --type and --image only.
#                    Runs no --setup; with --spot any failure is a restart, at most 1,000 (else --retries)
#   --image=IMAGE    for --jobset: a container with this code, its packages and "python" (docs/pods.md)
#   --claim=C:FOLDER for --jobset: mounts the PersistentVolumeClaim C, a disk that all machines share
#
# status, logs, stop and delete need --name, and --logs if the run had it: the rest stands in FOLDER/NAME/job where
# the run was started. Elsewhere all need --zone and --project (a JobSet: --jobset only), --slices if there are
# several, and logs --type. All take --dry_run. Needs gcloud (or kubectl), logged in.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

POLL="${TPU_RUN_POLL_SECONDS:-15}"
AGAIN=75    # the command saved and wants to be started again
STOPPED=253 # somebody called this script with stop
LOST=254    # a machine is gone

parse() {
  ACTION=run NAME="" TYPE="" ZONE="" PROJECT="" VERSION="" SLICES="" SPOT="" RETRIES=0 DELETE="" LOGS=runs/logs
  DRY="" JOBSET="" IMAGE="" CLAIM="" LOCAL="" SETUP="" ENVIRONMENT=() COMMAND=()
  case "${1:-}" in run | status | logs | stop | delete) ACTION="$1" && shift ;; esac
  while (($#)); do
    case "$1" in
      --name=*) NAME="${1#*=}" ;; --type=*) TYPE="${1#*=}" ;; --zone=*) ZONE="${1#*=}" ;;
      --project=*) PROJECT="${1#*=}" ;; --version=*) VERSION="${1#*=}" ;; --slices=*) SLICES="${1#*=}" ;;
      --retries=*) RETRIES="${1#*=}" ;; --logs=*) LOGS="${1#*=}" ;; --image=*) IMAGE="${1#*=}" ;;
      --local=*) LOCAL="${1#*=}" ;; --setup=*) SETUP="${1#*=}" ;; --claim=*) CLAIM="${1#*=}" ;;
      --env=*) ENVIRONMENT+=("${1#*=}") ;;
      --spot) SPOT=1 ;; --delete) DELETE=1 ;; --dry_run) DRY=1 ;; --jobset) JOBSET=1 ;;
      --name | --type | --zone | --project | --version | --slices | --retries | --logs | --image | --local | --env | \
        --setup | --claim)
        (($# > 1)) || fail "$1 must have a value"
        set -- "$1=$2" "${@:3}"
        continue ;;
      --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
      --) shift && COMMAND=("$@") && break ;;
      *) fail "unknown argument $1; words are status, logs, stop and delete; see --help" ;;
    esac
    shift
  done
  [[ "$ACTION" != run ]] || ((${#COMMAND[@]})) || fail "a command must follow --; see --help"
  [[ "${COMMAND[0]:-}" != *" "* ]] || fail "the command must be words, not one quoted text; got '${COMMAND[0]}'"
  [[ -z "$JOBSET" || -z "$SETUP" ]] || fail "a JobSet runs no --setup: its image holds links, --claim mounts a disk"
  [[ -z "$SLICES" || "$SLICES" =~ ^[1-9][0-9]*$ ]] || fail "--slices must be a number >= 1; got $SLICES"
  [[ "$RETRIES" =~ ^[0-9]+$ ]] || fail "--retries must be a number; got $RETRIES"
  [[ -z "$LOCAL" || "$LOCAL" =~ ^[1-9][0-9]*$ ]] || fail "--local must be a number >= 1; got $LOCAL"
  [[ -z "$CLAIM" || "$CLAIM" == ?*:/* ]] || fail "--claim must be CLAIM:FOLDER; got $CLAIM"
  [[ -z "$CLAIM" || "$JOBSET" ]] || fail "--claim is for --jobset only; --setup mounts disks elsewhere"
}

require() {
  local name
  for name in "$@"; do
    [[ -n "${!name}" ]] || fail "--${name,,} must be given; see --help"
  done
}

# Writes down what the other words need of a run; recall takes what was not given from there.
remember() {
  local name
  [[ -z "$DRY" ]] || return 0
  mkdir -p "$LOGS/$NAME"
  for name in TYPE ZONE PROJECT SLICES JOBSET; do echo "$name ${!name}"; done >"$LOGS/$NAME/job"
}

recall() {
  local name value
  require NAME
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] ||
    fail "--name must be lower-case letters, digits and dashes, at most 32; got $NAME"
  if [[ "$ACTION" != run && -f "$LOGS/$NAME/job" ]]; then
    while read -r name value; do [[ "${!name}" ]] || printf -v "$name" %s "$value"; done <"$LOGS/$NAME/job"
  fi
  SLICES="${SLICES:-1}"
}

# Reads CHIP TOPOLOGY CHIPS HOSTS CHIPS_PER_HOST GKE of --type, which becomes the cloud's name.
read_type() {
  local found
  found="$("$(find_python)" "$ROOT/molmo2_jax/chips.py" "$TYPE")" || exit 1
  read -r CHIP TOPOLOGY CHIPS HOSTS CHIPS_PER_HOST GKE TYPE <<<"$found"
  [[ "$CHIP" != tpu7x || "$JOBSET" ]] || fail "TPU7x is reached through GKE only: --jobset --image=...; got $TYPE"
}

say() { echo "== $*" >&2; }

show() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }" >&3
}

# Waits for the processes PIDS[0], PIDS[1], ... and returns the first status that is neither 0 nor $AGAIN, else the
# largest. After such a status, or if $STOPPING is set, `give_up` is called once, and again $STOP_SECONDS later.
watch() {
  local i code result=0 calls=0 deadline=0
  while ((${#PIDS[@]})); do
    for i in "${!PIDS[@]}"; do
      kill -0 "${PIDS[i]}" 2>/dev/null && continue
      code=0
      wait "${PIDS[i]}" || code=$?
      unset "PIDS[i]"
      say "${LABELS[i]} ended with status $code"
      if ((code > result)) && ((result == 0 || result == AGAIN)); then result=$code; fi
    done
    if ((${#PIDS[@]})) && ((calls < 2 && SECONDS >= deadline)) &&
        { [[ "$STOPPING" ]] || ((calls || (result && result != AGAIN))); }; then
      ((calls += 1, deadline = SECONDS + ${STOP_SECONDS:-60}))
      give_up "$calls"
    fi
    sleep 0.2
  done
  return "$result"
}

# ---- this machine ----

run_local() {
  local port i result=0
  port="$("$(find_python)" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
  give_up() { if (($1 == 1)); then kill -TERM "${PIDS[@]}"; else kill -KILL "${PIDS[@]}"; fi 2>/dev/null || true; }
  for ((i = 0; i < LOCAL; i++)); do
    if [[ "$DRY" ]]; then
      show env "${ENVIRONMENT[@]}" "MOLMO2_HOSTS=localhost:PORT,$LOCAL,$i" "${COMMAND[@]}"
      continue
    fi
    env "${ENVIRONMENT[@]}" "MOLMO2_HOSTS=localhost:$port,$LOCAL,$i" "${COMMAND[@]}" \
      > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) 3>&- &
    PIDS[i]=$!
    LABELS[i]="process $i"
  done
  trap 'STOPPING=1' TERM INT
  watch || result=$?
  wait
  return "$result"
}

# ---- queued resources ----

gcloud_tpu() { gcloud compute tpus "$@" "--zone=$ZONE" "--project=$PROJECT" --quiet </dev/null 3>&-; }

# Runs or shows a command that changes something.
change() { if [[ "$DRY" ]]; then show gcloud compute tpus "$@" "--zone=$ZONE" "--project=$PROJECT" --quiet; else gcloud_tpu "$@"; fi; }

# Prints the state of the queued resource, NONE if there is none; fails with gcloud's error if it cannot know.
state() {
  local problem="$TEMPORARY/problem"
  if [[ "$DRY" ]]; then
    change queued-resources describe "$NAME" '--format=value(state.state)'
    [[ -f "$TEMPORARY/created" ]] && echo ACTIVE || echo NONE
  elif ! gcloud_tpu queued-resources describe "$NAME" '--format=value(state.state)' 2>"$problem"; then
    grep -qiE 'not.?found|does not exist' "$problem" || fail "$(<"$problem")"
    echo NONE
  fi
}

nodes() { if ((SLICES == 1)); then echo "$NAME"; else seq -f "$NAME-%.0f" 0 $((SLICES - 1)); fi; }

create() {
  local which=("--node-id=$NAME") problem="$TEMPORARY/problem"
  ((SLICES == 1)) || which=("--node-count=$SLICES" "--node-prefix=$NAME")
  say "asking for $SLICES x $TYPE ($CHIP $TOPOLOGY, $CHIPS chips on $HOSTS machines)"
  touch "$TEMPORARY/created"
  change queued-resources create "$NAME" "${which[@]}" "--accelerator-type=$TYPE" "--runtime-version=$VERSION" \
    ${SPOT:+--spot} 2>"$problem" && return
  if grep -qi 'already.\?exists' "$problem"; then return; fi
  if grep -qiE 'quota|resource_exhausted' "$problem"; then
    fail "the project has no quota for $SLICES x $TYPE in $ZONE: $(tail -n 1 "$problem")"
  fi
  fail "$(<"$problem")"
}

delete() {
  local now
  now="$(state)" || exit 1
  [[ "$now" == NONE ]] || change queued-resources delete "$NAME" --force || exit 1
  [[ "$DRY" ]] && return
  while now="$(state)" || exit 1; [[ "$now" != NONE ]]; do sleep "$POLL"; done
  rm -f "$LOGS/$NAME/job"
}

# Returns once all machines are there; makes them if they are not.
ensure() {
  local now before="" failures=0
  while true; do
    now="$(state)" || exit 1
    [[ "$now" == "$before" ]] || say "queued resource $NAME: $now"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      NONE) create && continue ;;
      FAILED | SUSPENDING | SUSPENDED)
        ((++failures <= 3)) || [[ "$SPOT" ]] || fail "the queued resource $NAME was refused three times"
        delete && continue ;;
    esac
    sleep "$POLL"
  done
}

# on_all NODE COMMAND: runs a line of shell on all machines of a slice.
on_all() { change tpu-vm ssh "$1" --worker=all "--command=$2"; }

archive() {
  local path
  git -C "$ROOT" rev-parse --git-dir &>/dev/null || fail "what is copied is what git lists: $ROOT must be a repository"
  git -C "$ROOT" ls-files -z --cached --others --exclude-standard |
    while IFS= read -rd '' path; do
      if [[ -f "$ROOT/$path" ]]; then printf '%s\0' "$path"; fi
      if [[ -d "$ROOT/$path" ]]; then say "not copied: $path, a link to a folder"; fi
    done |
    tar --directory="$ROOT" --null --files-from=- --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner |
    gzip --no-name >"$TEMPORARY/code.tar.gz"
  cp "$ROOT/launch/tpu_worker.sh" "$TEMPORARY/"
  HASH="$(sha256sum <"$TEMPORARY/code.tar.gz" | cut -c1-16)"
}

prepare() {
  local node
  archive
  for node in $(nodes); do
    say "copying the code to $node and installing it"
    on_all "$node" "mkdir -p $NAME" || return 1
    change tpu-vm scp "$TEMPORARY/code.tar.gz" "$TEMPORARY/tpu_worker.sh" "$node:$NAME/" --worker=all || return 1
    on_all "$node" "bash $NAME/tpu_worker.sh unpack \$HOME/$NAME/code.tar.gz $HASH" || return 1
    [[ -z "$SETUP" ]] || on_all "$node" "cd $NAME/code && ($SETUP)" || return 1
  done
}

# Starts the command on all machines, unless it runs on all of them.
start() {
  local node line
  if [[ -z "$DRY" && "$(status | sort -u)" == running ]]; then
    say "the command runs already"
    return
  fi
  printf -v line '%q ' env MOLMO2_HOSTS=auto "${ENVIRONMENT[@]}" "${COMMAND[@]}"
  for node in $(nodes); do on_all "$node" "bash $NAME/tpu_worker.sh stop" || return 1; done
  for node in $(nodes); do on_all "$node" "bash $NAME/tpu_worker.sh start ${line% }" || return 1; done
}

# Prints what the command does on each machine; "lost" and gcloud's error, and fails, where that is not known.
status() {
  local node code=0
  for node in $(nodes); do
    on_all "$node" "bash $NAME/tpu_worker.sh status 2>/dev/null || echo nothing" || { echo lost && code=1; }
  done
  return "$code"
}

# stop_all [by_hand]: see tpu_worker.sh.
stop_all() {
  local node code=0
  for node in $(nodes); do on_all "$node" "bash $NAME/tpu_worker.sh stop ${1:-}" || code=1; done
  return "$code"
}

is_there() { [[ "$(gcloud_tpu tpu-vm describe "$1" '--format=value(state)' 2>/dev/null)" == READY ]]; }

# follow NODE WORKER: prints a machine's output until the command ends there; returns its status, or $LOST.
follow() {
  local log="$LOGS/$NAME/$1-$2.log" label="$1/$2" last
  if [[ "$DRY" ]]; then
    change tpu-vm ssh "$1" "--worker=$2" "--command=bash $NAME/tpu_worker.sh attach 1"
    return
  fi
  : >"$log"
  while true; do
    gcloud_tpu tpu-vm ssh "$1" "--worker=$2" "--command=bash $NAME/tpu_worker.sh attach $(($(wc -l <"$log") + 1))" \
      2>>"$log.ssh" | tee -a "$log" | sed -u "s|^|[$label] |" || true
    last="$(tail -n 1 "$log")"
    if [[ "$last" == "== the job ended with status "* ]]; then return "${last##* }"; fi
    [[ "$last" != "== no job was started here" ]] || return "$LOST"
    is_there "$1" || return "$LOST"
    say "the connection to $label broke; connecting again ($(tail -n 1 "$log.ssh"))"
    sleep "$POLL"
  done
}

follow_all() {
  local node worker i=0
  mkdir -p "$LOGS/$NAME"
  give_up() { if [[ "$STOPPING" ]]; then kill -- "${PIDS[@]/#/-}"; else stop_all >&2; fi 2>/dev/null || true; }
  for node in $(nodes); do
    for ((worker = 0; worker < HOSTS; worker++)); do
      if [[ "$DRY" ]]; then follow "$node" "$worker" && continue; fi
      set -m   # a process group of its own, to be ended as one
      follow "$node" "$worker" &
      PIDS[i]=$!
      set +m
      LABELS[i]="$node/$worker"
      ((i += 1))
    done
  done
  watch
}

run_on_tpu() {
  local code failures=0
  trap 'STOPPING=1' TERM INT
  remember
  while true; do
    ensure
    code=0
    prepare && start && follow_all || code=$?
    [[ -z "$STOPPING" ]] || fail "this script was ended; the command goes on: call it again, or with stop or delete"
    if ((code && code != AGAIN && code != STOPPED)) && [[ "$(state)" != ACTIVE ]]; then code=$LOST; fi
    case "$code" in
      0) break ;;
      "$AGAIN") say "the command saved and wants to go on" ;;
      "$STOPPED") fail "the command was stopped; the same call of this script goes on with it" ;;
      "$LOST") [[ "$SPOT" ]] || fail "machines were lost; the same command asks for others (--spot does so by itself)"
        say "machines were taken away; asking again" ;;
      *) ((failures++ < RETRIES)) || { echo "error: the command failed with status $code" >&2; exit "$code"; }
        say "the command failed with status $code; starting it again ($failures of $RETRIES)" ;;
    esac
    sleep "$POLL"
  done
  [[ "$DRY" ]] || say "the command has ended well on all machines"
  [[ -z "$DELETE" ]] || delete
}

# The words status and logs: what the cloud and, if there are machines, these say.
watch_job() {
  local now
  [[ "$ACTION" == status ]] || require TYPE
  now="$(state)" || exit 1
  [[ "$DRY" ]] || say "queued resource $NAME: $now"
  if [[ "$ACTION" == status ]]; then
    [[ "$now" != ACTIVE ]] || status
  else
    [[ "$now" == ACTIVE ]] || fail "there is no machine to read from: the queued resource $NAME is $now"
    read_type
    follow_all
  fi
}

# ---- GKE ----

quoted() { "$(find_python)" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }

# A pod that ends with status 75 has saved: its job fails by the pods' policy, upon which all are started again. Any
# other failure counts as one of maxRestarts; GKE does not tell a lost machine from a command that fails.
jobset() {
  local variable
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $((SPOT ? 1000 : RETRIES))
    rules:
      - {name: saved, action: RestartJobSetAndIgnoreMaxRestarts, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: slice
      replicas: $SLICES   # of $TYPE: $CHIP $TOPOLOGY, $CHIPS chips
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - {action: FailJob, onExitCodes: {containerName: worker, operator: In, values: [$AGAIN]}}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $GKE
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
END
  [[ -z "$SPOT" ]] || echo '                cloud.google.com/gke-spot: "true"'
  cat <<END
              containers:
                - name: worker
                  image: $IMAGE
                  command: $(quoted "${COMMAND[@]}")
                  env:
                    - {name: MOLMO2_HOSTS, value: auto}
END
  for variable in "${ENVIRONMENT[@]}"; do
    echo "                    - {name: ${variable%%=*}, value: $(quoted "${variable#*=}" | sed 's/^\[//;s/\]$//')}"
  done
  cat <<END
                  resources:
                    limits:
                      google.com/tpu: $CHIPS_PER_HOST
                  volumeMounts:
                    - {name: shm, mountPath: /dev/shm}   # data workers hand arrays over in it
END
  [[ -z "$CLAIM" ]] || echo "                    - {name: disk, mountPath: $(quoted "${CLAIM#*:}" | tr -d '[]')}"
  cat <<END
              volumes:
                - {name: shm, emptyDir: {medium: Memory}}
END
  [[ -z "$CLAIM" ]] || echo "                - {name: disk, persistentVolumeClaim: {claimName: ${CLAIM%%:*}}}"
}

run_on_gke() {
  local selector="jobset.sigs.k8s.io/jobset-name=$NAME" job=(get jobset "$NAME")
  case "$ACTION" in
    run)
      require TYPE IMAGE
      read_type
      if [[ "$DRY" ]]; then jobset; else jobset | kubectl apply --filename=- && remember; fi
      return ;;
    logs) job=(logs --follow --prefix --max-log-requests=1024 --selector "$selector") ;;
    stop | delete) job=(delete jobset "$NAME" --ignore-not-found) ;;
  esac
  if [[ "$DRY" ]]; then show kubectl "${job[@]}"; else kubectl "${job[@]}"; fi
}

# ---- all ----

main() {
  parse "$@"
  exec 3>&1
  PIDS=() LABELS=() STOPPING=""
  TEMPORARY="$(mktemp -d)"
  trap 'rm -rf "$TEMPORARY"' EXIT
  if [[ "$LOCAL" ]]; then run_local && return; exit $?; fi
  recall
  if [[ "$JOBSET" ]]; then run_on_gke && return; exit $?; fi
  require ZONE PROJECT
  [[ "$ACTION" == run ]] || touch "$TEMPORARY/created"   # which --dry_run takes for granted
  case "$ACTION" in
    run) require TYPE VERSION && read_type && run_on_tpu ;;
    stop) stop_all by_hand ;;
    delete) delete ;;
    status | logs) watch_job ;;
  esac
}

main "$@"
