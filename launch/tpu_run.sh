#!/usr/bin/env bash
# Runs a command on every machine of a TPU slice until it has ended.
#
#   launch/tpu_run.sh --name=sft --type=v5p-256 --zone=us-east5-a --project=mine --version=v2-alpha-tpuv5 \
#       --setup='MOUNT /mnt/disk && ln -sfn /mnt/disk/data /mnt/disk/pretrained .' \
#       -- python -m launch.train --gin_file=gin_configs/runs/sft_8b.gin --workdir=/mnt/disk/sft \
#          --init_from=/mnt/disk/pretrain
#   launch/tpu_run.sh status|logs|stop|delete --name=sft
#
# Creates the slice as a queued resource, waits for it, copies the code of this folder, installs it, starts the
# command on all machines and prints their output, each line after the name of its machine. The command continues
# if this script or its connection ends; the same call of the script continues wherever it stopped. A command that
# ends with status 75 has saved and wants to be started again, as launch.train does upon SIGTERM: that is done, and
# is no failure. What the cloud cannot say now is asked again, for an hour; only its clear word that machines are
# gone counts as a loss, and only the command's own status as its failure.
#
# Copied is what git tracks or would add, to ~/NAME/code of every machine, where the command runs. Not copied is
# what .gitignore names (data/, pretrained/, hf/, runs/, .venv/) and every linked folder: what the command reads
# and writes must be on a disk that all machines share. While a command runs, its name takes no other command and no
# other code. docs/pods.md tells more.
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
#
# Of the slice (gcloud compute tpus queued-resources create --help tells what they mean):
#   --reserved, --best_effort               instead of --spot: machines of a reservation; any that are free
#   --valid_until=2h or =TIME               gives up the request if there are no machines by then
#   --network, --subnetwork, --service_account, --labels=K=V,..., --data_disk=source=...,mode=... (repeated)
#   --internal_ips   machines without external addresses, reached by their internal ones; with --iap
#   --iap            by a tunnel (Identity-Aware Proxy), which is the way from outside of the network
#   --create_flag=FLAG, --ssh_flag=FLAG     any other flag for the creation, or for ssh; may be repeated
#
# On GKE (docs/pods.md says which to choose):
#   --jobset         the same job as a JobSet, applied with kubectl; needs --name, --type and --image only. The
#                    cluster restarts it; calling again resumes one that was stopped, and replaces one that has ended.
#                    Runs no --setup; with --spot any failure is a restart, at most 1,000 (else --retries)
#   --image=IMAGE    a container with this code, its packages and "python" (docs/pods.md)
#   --claim=C:FOLDER mounts the PersistentVolumeClaim C, a disk that all machines share
#
# status, logs, stop and delete need --name, and --logs if the run had it: the rest is in FOLDER/NAME/job where the
# run was started. Elsewhere all need --zone and --project (a JobSet: --jobset only), --slices if there are several,
# logs --type, and all but delete --iap, --internal_ips and --ssh_flag as the run. stop lets the command save and
# keeps the slice; stop and delete take back a request that still waits. All take --dry_run. Needs Python 3.11 and
# gcloud (or kubectl), logged in.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case "${1:-}" in
  --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
# This folder's modules win over installed ones, without a variable that the command would inherit.
python="$(find_python)"
exec "$python" -B -c 'import sys; sys.path.insert(0, sys.argv.pop(1))
from launch import tpu_run
tpu_run.main()' "$ROOT" "$@"
