#!/usr/bin/env bash
# Runs on a TPU machine, called by tpu_run.sh: manages one job that survives a dropped connection.
#
#   tpu_worker.sh unpack ARCHIVE HASH   unpacks and installs the code, unless that was already done for this hash
#   tpu_worker.sh setup LINE            runs a shell line in the folder of the code
#   tpu_worker.sh start COMMAND...      starts the job unless it is running; removes the files of an earlier job.
#                                       Status 253: "stop by_hand" was called since the last "look new"
#   tpu_worker.sh attach BYTE NONCE RUN prints the log of this run from that byte on, between marks, until the job
#                                       ends
#   tpu_worker.sh status                prints "running", "ended STATUS" or "nothing"
#   tpu_worker.sh poll                  the same after the machine's name, and the end of the log of a failed job
#   tpu_worker.sh look [new]            prints "running IDENTITY COMMAND", "ended" or "nothing"; new: a run begins
#   tpu_worker.sh stop [by_hand]        sends SIGTERM to the command, on which training saves; after $STOP_SECONDS,
#                                       SIGKILL to all its processes. by_hand: attach then reports status 253
#
# Each word except attach prints its exit status in its last line. The identity of a job consists of a hash of its
# command and HASH, the hash of its code. A mark of attach is text between the bytes 036 and 037 that begins with
# NONCE: "from BYTE RUN", "ended STATUS", "nothing" (there is no job) or "replaced" (by another job).
set -euo pipefail

FOLDER="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"   # code/ and job/ are beside this file
JOB="$FOLDER/job"
BOOT=/proc/sys/kernel/random/boot_id

# After a reboot, a process with the same number is a different one.
is_running() {
  [[ -f "$JOB/pid" && ! -f "$JOB/status" ]] && [[ "$(cat "$JOB/boot" 2>/dev/null)" == "$(<$BOOT)" ]] &&
    kill -0 "$(<"$JOB/pid")" 2>/dev/null
}

has_processes() {
  [[ -f "$JOB/pid" && "$(cat "$JOB/boot" 2>/dev/null)" == "$(<$BOOT)" ]] && pgrep -g "$(<"$JOB/pid")" >/dev/null
}

# patiently COMMAND...: tries up to five times; another process may hold a lock, a mirror may be unreachable.
patiently() {
  local try
  for try in 1 2 3 4; do
    "$@" && return
    echo "failed ($try of 5): $*; trying again" >&2
    sleep "$((try * ${RETRY_SECONDS:-15}))"
  done
  "$@"
}

apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 "$@"; }

unpack() {
  local archive="$1" hash="$2" name
  if [[ -f "$FOLDER/code.hash" && "$(<"$FOLDER/code.hash")" == "$hash" ]]; then
    echo "code is up to date"
    return
  fi
  rm -f "$FOLDER/code.hash"
  mkdir -p "$FOLDER/code"
  cd "$FOLDER/code"
  tar -tzf "$archive" | cut -d/ -f1 | sort -u | while IFS= read -r name; do rm -rf "./$name"; done
  tar -xzf "$archive"
  # The machines' images have Python 3.10. In their first minutes machines update themselves and hold apt's locks.
  if [[ -z "$(type -P python3.11 python3.12 python3.13 python3.14)" ]]; then
    patiently sudo add-apt-repository -y --no-update ppa:deadsnakes/ppa
    patiently apt update -qq
    patiently apt install -y -qq python3.11 python3.11-venv
  fi
  patiently bash -c 'source launch/environment.sh && install tpu'
  echo "$hash" >"$FOLDER/code.hash"
}

setup() { cd "$FOLDER/code" && bash -c "$1"; }

# Removes the lock file of a libtpu whose process was killed; keeps one that a process holds.
remove_stale_lock() {
  local lock="${LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}"
  [[ -e "$lock" ]] || return 0
  if grep -q ":$(stat -c %i "$lock") " /proc/locks; then
    echo "another process uses the TPU: it holds $lock"
  else
    rm -f "$lock" 2>/dev/null || sudo -n rm -f "$lock" || echo "could not remove $lock"
  fi
}

start() {
  if is_running; then
    echo "the job is running already"
    return
  fi
  if [[ -f "$FOLDER/stopped" ]]; then
    echo "the job was stopped before it began"
    return 253
  fi
  if has_processes; then kill -KILL -- "-$(<"$JOB/pid")" || true; fi
  remove_stale_lock
  rm -rf "$JOB"
  mkdir -p "$JOB"
  touch "$JOB/log"
  echo "$(printf '%s\0' "$@" | sha256sum | cut -c1-16).$(<"$FOLDER/code.hash")" >"$JOB/identity"
  printf '%q ' "$@" >"$JOB/command"
  date +%s%N >"$JOB/run"
  cp "$BOOT" "$JOB/boot"
  cd "$FOLDER/code"
  # The shell around the command survives SIGTERM, to record how the command ended.
  # shellcheck disable=SC2016
  PATH="$PWD/.venv/bin:$PATH" setsid nohup bash -c '
    trap : TERM
    code=0
    bash -c "echo \$\$ >\"\$0\" && exec \"\$@\"" "$1/command_pid" "${@:2}" || code=$?
    echo "$code" >"$1/status.new"
    mv "$1/status.new" "$1/status"' job "$JOB" "$@" >"$JOB/log" 2>&1 </dev/null &
  echo $! >"$JOB/pid"
  echo "the job has started"
}

attach() {
  local from="${1:-0}" nonce="${2:-}" run="${3:-}" code=137 now   # 137: killed, if no status was written
  mark() { printf '\036%s %s\037' "$nonce" "$*"; }
  if [[ ! -f "$JOB/pid" ]]; then
    mark nothing
    return
  fi
  now="$(<"$JOB/run")"
  [[ "$run" == "$now" ]] || from=0
  mark from "$from" "$now"
  tail -c "+$((from + 1))" --pid="$(<"$JOB/pid")" -s 0.2 -f "$JOB/log" 2>/dev/null || true
  if [[ "$(cat "$JOB/run" 2>/dev/null)" != "$now" ]]; then
    mark replaced
    return
  fi
  [[ -f "$JOB/status" ]] && code="$(<"$JOB/status")"
  [[ -f "$JOB/by_hand" ]] && code=253
  mark ended "$code"
}

status() {
  if is_running; then
    echo running
  elif [[ -f "$JOB/pid" ]]; then
    echo "ended $(cat "$JOB/status" 2>/dev/null || echo 137)"
  else
    echo nothing
  fi
}

poll() {
  local now
  now="$(status)"
  [[ ! -f "$JOB/by_hand" || "$now" != ended* ]] || now="ended 253"
  case "$now" in
    running | nothing | "ended 0" | "ended 75" | "ended 253") ;;
    *) tail -n 20 "$JOB/log" | sed "s/^/[$HOSTNAME] /" ;;
  esac
  echo "$HOSTNAME $now"
}

look() {
  [[ "${1:-}" != new ]] || rm -f "$FOLDER/stopped"
  if is_running; then
    echo "running $(<"$JOB/identity") $(<"$JOB/command")"
  elif [[ -f "$JOB/pid" ]]; then
    echo ended
  else
    echo nothing
  fi
}

# Only the command itself gets the signal: it saves, and needs its data workers until then. If the command is a shell
# that ended without waiting for its own commands, they get the signal next.
stop() {
  local group tenth told=""
  [[ "${1:-}" != by_hand ]] || touch "$FOLDER/stopped"
  if ! is_running; then
    echo "nothing runs"
    return
  fi
  group="$(<"$JOB/pid")"
  [[ "${1:-}" != by_hand ]] || touch "$JOB/by_hand"
  kill -TERM "$(cat "$JOB/command_pid" 2>/dev/null || echo "-$group")" 2>/dev/null || true
  for ((tenth = 0; tenth < ${STOP_SECONDS:-120} * 10; tenth++)); do
    if ! has_processes; then
      echo stopped
      return
    fi
    if [[ -z "$told" ]] && ! is_running; then
      told=1
      kill -TERM -- "-$group" 2>/dev/null || true
    fi
    sleep 0.1
  done
  kill -KILL -- "-$group" || true
  for ((tenth = 0; tenth < 100; tenth++)); do
    is_running || break
    sleep 0.1
  done
  echo killed
}

WORD="$1"   # in a trap, $1 may be the argument of a function
[[ "$WORD" == attach ]] || trap 'echo "== $WORD ended with status $?"' EXIT
"$@"
