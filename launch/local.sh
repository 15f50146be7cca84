#!/usr/bin/env bash
# N processes on this machine that work as one, over the loopback interface.
#
#   launch/local.sh N COMMAND...
#
#   launch/local.sh 2 sae-jax train recipe.yaml --data SET --out RUN
#   launch/local.sh 4 bash -c 'CUDA_VISIBLE_DEVICES=$JAX_PROCESS_ID \
#       sae-jax harvest recipe.yaml --out SET --shard $JAX_PROCESS_ID/$JAX_NUM_PROCESSES'
#
# On a machine with GPUs process i of a command whose processes join, as those of train do, gets GPU i. Harvest workers
# do not join, and each would take all GPUs: CUDA_VISIBLE_DEVICES gives worker i GPU i, and does no harm elsewhere.
# SIGTERM and Ctrl-C are passed on to all processes. When one fails, the others, which would wait for it, have ten
# seconds to say why they fail too; then they are killed. The exit code is that of the first one that failed, or 0.
set -um # -m: without job control, background processes of a script ignore Ctrl-C

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh N COMMAND..." >&2
    exit 2
fi
n=$1
shift

port=$((20000 + RANDOM % 10000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done # a port that answers is taken
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$n

running=()
pass_on() { # signal
    for pid in "${running[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null; done
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

for ((i = 0; i < n; i++)); do
    if [[ -e /dev/nvidia0 ]]; then export JAX_LOCAL_DEVICE_IDS=$i; fi
    JAX_PROCESS_ID=$i "$@" &
    running+=($!)
done

code=0
until=
while ((${#running[@]})); do
    sleep 0.2 &
    wait $! # a trap runs at once then, and Ctrl-C does not go to sleep
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
        else
            wait "$pid"
            result=$?
            if ((result && !code)); then
                code=$result
                until=$((SECONDS + 10))
            fi
        fi
    done
    running=(${left[@]+"${left[@]}"})
    if [[ -n $until ]] && ((SECONDS >= until)); then pass_on KILL; fi
done
exit "$code"
