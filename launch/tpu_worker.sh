#!/usr/bin/env bash
# Runs on a TPU machine, called by tpu_run.sh: keeps one job that survives a dropped connection.
#
#   tpu_worker.sh unpack ARCHIVE HASH   unpacks the code and installs it, unless that was done with this hash
#   tpu_worker.sh start COMMAND...      starts the job, unless it runs; what an earlier one left is forgotten
#   tpu_worker.sh attach LINE           prints the job's output from that line on until it ends, and its status
#   tpu_worker.sh status                prints "running", "ended STATUS" or "nothing"
#   tpu_worker.sh stop [by_hand]        SIGTERM, upon which training saves; SIGKILL after $STOP_SECONDS. By hand:
#                                       whoever is attached sees status 253 instead, not to start it again
set -euo pipefail

FOLDER="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"   # code/ and job/ lie beside this file
JOB="$FOLDER/job"

is_running() { [[ -f "$JOB/pid" && ! -f "$JOB/status" ]] && kill -0 "$(<"$JOB/pid")" 2>/dev/null; }

unpack() {
  local archive="$1" hash="$2" name
  if [[ -f "$FOLDER/code.hash" && "$(<"$FOLDER/code.hash")" == "$hash" ]]; then
    echo "code is up to date"
    return
  fi
  mkdir -p "$FOLDER/code"
  cd "$FOLDER/code"
  tar -tzf "$archive" | cut -d/ -f1 | sort -u | while IFS= read -r name; do rm -rf "./$name"; done
  tar -xzf "$archive"
  if [[ -z "$(type -P python3.11 python3.12 python3.13 python3.14)" ]]; then   # the machines' images have 3.10
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    sudo apt-get install -y -qq python3.11 python3.11-venv
  fi
  bash -c 'source launch/environment.sh && install tpu'
  echo "$hash" >"$FOLDER/code.hash"
}

start() {
  if is_running; then
    echo "the job is running already"
    return
  fi
  rm -rf "$JOB"
  mkdir -p "$JOB"
  touch "$JOB/log"
  cd "$FOLDER/code"
  # The shell around the command outlives SIGTERM, to write down how the command ended.
  # shellcheck disable=SC2016
  PATH="$PWD/.venv/bin:$PATH" setsid nohup bash -c '
    trap : TERM
    code=0
    "${@:2}" || code=$?
    echo "$code" >"$1/status.new"
    mv "$1/status.new" "$1/status"' job "$JOB" "$@" >"$JOB/log" 2>&1 </dev/null &
  echo $! >"$JOB/pid"
  echo "the job has started"
}

attach() {
  local line="${1:-1}" code=137   # killed, if nobody wrote another status
  if [[ ! -f "$JOB/pid" ]]; then
    echo "== no job was started here"
    return
  fi
  tail -n "+$line" --pid="$(<"$JOB/pid")" -s 0.2 -F "$JOB/log" 2>/dev/null || true
  [[ -f "$JOB/status" ]] && code="$(<"$JOB/status")"
  [[ -f "$JOB/by_hand" ]] && code=253
  echo "== the job ended with status $code"
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

stop() {
  local pid second
  if ! is_running; then
    echo "nothing runs"
    return
  fi
  pid="$(<"$JOB/pid")"
  [[ "${1:-}" != by_hand ]] || touch "$JOB/by_hand"
  kill -TERM -- "-$pid"
  for ((second = 0; second < ${STOP_SECONDS:-120}; second++)); do
    if ! is_running; then
      echo stopped
      return
    fi
    sleep 1
  done
  kill -KILL -- "-$pid" || true
  echo killed
}

"$@"
