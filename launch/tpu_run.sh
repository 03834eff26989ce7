#!/usr/bin/env bash
# Runs a command on every machine of a TPU slice until it has succeeded.
#
#   launch/tpu_run.sh --name=sft --type=v5p-256 --zone=us-east5-a --project=mine --version=v2-alpha-tpuv5 \
#       --setup='MOUNT /mnt/disk && ln -sfn /mnt/disk/data /mnt/disk/pretrained .' \
#       -- python -m launch.train --gin_file=gin_configs/runs/sft_8b.gin --workdir=/mnt/disk/sft \
#          --init_from=/mnt/disk/pretrain
#   launch/tpu_run.sh status|logs|stop|delete --name=sft
#
# Creates the slice as a queued resource, waits for it, copies the code of this repository, installs it, starts the
# command on all machines and prints their output, each line after the name of its machine. If this script or its
# connection ends, the command continues; the same call of the script resumes where it stopped. A command that ends
# with status 75 has saved and asks to be restarted, as launch.train does on SIGTERM: the script restarts it and does
# not count this as a failure. A cloud call without a clear answer is retried for an hour. Machines count as lost
# only if the cloud clearly says so, and the command counts as failed only by its own exit status.
#
# The files that git tracks or would add are copied to ~/NAME/code on every machine, where the command runs. Files in
# .gitignore (data/, pretrained/, hf/, runs/, .venv/) and linked folders are not copied: the command must read and
# write its files on a disk that all machines share. While a command is running, the script refuses another command
# or other code under the same name. More in docs/pods.md.
#
# Flags of a run, defaults in brackets:
#   --name, --zone, --project, --version    required; the version is the machines' image, such as v2-alpha-tpuv5
#   --type           required; the cloud's name of a slice: v5p-256 has 128 chips
#   --slices=N       number of slices, connected by the data centre network (1)
#   --spot           machines that may be taken away; the slice is then requested again and the command repeated
#   --setup=LINE     shell line run on every machine in ~/NAME/code before each start, to mount disks or make links
#   --env=NAME=VALUE environment variable of the command; may be repeated
#   --retries=N      how often to restart a command that fails on healthy machines (0)
#   --delete         deletes the slice after the command has succeeded
#   --logs=FOLDER    folder that keeps the output (runs/logs)
#   --dry_run        prints the cloud commands without running them
#   --local=N        N processes on this machine instead, connected by jax.distributed; needs none of the above
#
# Flags of the slice (explained by gcloud compute tpus queued-resources create --help):
#   --reserved, --best_effort               instead of --spot: machines of a reservation; any free machines
#   --valid_until=2h or =TIME               gives up the request if there are no machines by then
#   --network, --subnetwork, --service_account, --labels=K=V,..., --data_disk=source=...,mode=... (repeated)
#   --internal_ips   machines without external addresses, reached by their internal ones or, with --iap,
#   --iap            through a tunnel (Identity-Aware Proxy), which works from outside the network
#   --create_flag=FLAG, --ssh_flag=FLAG     any other flag of the creation or of ssh; may be repeated
#
# Flags for GKE (docs/pods.md compares both ways):
#   --jobset         runs the job as a JobSet, applied with kubectl; needs only --name, --type and --image. The
#                    cluster restarts it. Calling again resumes a stopped JobSet and replaces one that has ended.
#                    Runs no --setup. With --spot any failure is a restart, at most 1,000 (else --retries)
#   --image=IMAGE    a container with this code, its packages and "python" (docs/pods.md)
#   --claim=C:FOLDER mounts the PersistentVolumeClaim C, a disk that all machines share
#
# status, logs, stop and delete need --name, and --logs if the run had it; the other flags are read from
# FOLDER/NAME/job on the machine where the run was started. On another machine all need --zone and --project (for a
# JobSet only --jobset) and, with several slices, --slices; logs needs --type; all but delete need the run's --iap,
# --internal_ips and --ssh_flag. stop makes the command save and keeps the slice; stop and delete withdraw a request
# that is still waiting. All accept --dry_run. Needs Python 3.11 and gcloud (or kubectl), logged in.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
  --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
# This repository's modules take precedence over installed ones, without a variable that the command would inherit.
python="$(find_python)"
exec "$python" -B -c 'import sys; sys.path.insert(0, sys.argv.pop(1))
from launch.tpu import run
run.main()' "$ROOT" "$@"
