#!/bin/bash
# Several machines over plain ssh, each with this repository (and a shared runs_dir) at the same path:
#
#   scripts/ssh.sh "node1 node2" configs/gpt_3b.py [--field=value ...]
#
# node1 must be reachable from the others under this name. Ctrl-C stops all; the same line goes on. NPROC says how many
# processes a machine runs, one for each of its GPUs unless set.
set -u
[ $# -ge 2 ] || { echo 'usage: scripts/ssh.sh "HOST ..." CONFIG [--field=value ...]' >&2; exit 2; }
read -ra hosts <<< "$1"
shift
for i in "${!hosts[@]}"; do
  launch=(torchrun --nnodes="${#hosts[@]}" --node_rank="$i" --nproc_per_node="${NPROC:-gpu}"
    --shutdown-timeout=110 --master_addr="${hosts[0]}" --master_port="${MASTER_PORT:-29500}" train.py "$@" --resume)
  # -tt: the remote processes end with the connection
  ssh -tt "${hosts[$i]}" "cd $(printf %q "$PWD") && PATH=$(printf %q "$PWD/.venv/bin"):\$PATH && exec ${launch[*]@Q}" &
done
trap 'kill $(jobs -p) 2> /dev/null' EXIT INT TERM
code=0
for _ in "${hosts[@]}"; do
  wait -n || { code=$?; break; }  # one machine failed: the others cannot go on
done
exit $code
