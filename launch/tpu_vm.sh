#!/usr/bin/env bash
# A slice of Cloud TPU VMs: made by a queued resource, set up, used by all of its hosts at once, and deleted.
#
#   export TPU=sae ZONE=us-east5-a TYPE=v5p-32 VERSION=v2-alpha-tpuv5        # and SPOT=1, PROJECT=...
#   launch/tpu_vm.sh create                                                # returns when it is there
#   launch/tpu_vm.sh setup                                                 # this checkout, onto all hosts
#   launch/tpu_vm.sh run train recipe.yaml --data gs://BUCKET/set --out gs://BUCKET/run
#   launch/tpu_vm.sh keep train recipe.yaml --data gs://BUCKET/set --out gs://BUCKET/run
#   launch/tpu_vm.sh delete
#
# `run` is `sae-jax ARGUMENTS` on every host, in the copy of this checkout: the hosts find each other, and what they say
# comes back here. `keep` does all of it, and where the slice has been taken away it deletes
# what is left, makes another and repeats the command, which resumes, until that ends by itself. A host that is about
# to be taken away gets SIGTERM: all save at the same step and leave with 75. What a recipe or a set on a disk is to
# the hosts must lie in the checkout, where git does not ignore it; all else at gs://.
#
# Needs gcloud, logged in (https://cloud.google.com/sdk). Exit codes are those of the command, or of gcloud.
set -uo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?such as us-east5-a}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
every=${SECONDS_BETWEEN_LOOKS:-20}

tpus() { gcloud compute tpus "$@" "${where[@]}"; }
on_all() { tpus tpu-vm ssh "$TPU" --worker=all --command="$1"; }
state() { tpus queued-resources describe "$TPU" --format='value(state.state)' 2>/dev/null; }

create() {
    tpus queued-resources create "$TPU" --node-id="$TPU" --accelerator-type="${TYPE:?such as v5p-32}" \
        --runtime-version="${VERSION:?such as v2-alpha-tpuv5}" ${SPOT:+--spot} || return
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        if [[ $now == FAILED || $now == SUSPENDED ]]; then
            echo "tpu_vm.sh: $TPU is $now; see: gcloud compute tpus queued-resources describe $TPU" >&2
            return 1
        fi
        sleep "$every"
    done
}

# What git does not ignore, so not the sets and runs in work/; all where git knows nothing of the folder.
files() {
    cd "$here" || return
    git rev-parse --is-inside-work-tree >/dev/null 2>&1 || { printf '.\0' && return; }
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi # git lists what has been deleted, too
    done
}

setup() {
    local archive
    archive=$(mktemp) || return
    (files) | tar -C "$here" --exclude=.git --exclude='.venv*' -czf "$archive" --null -T - &&
        tpus tpu-vm scp "$archive" "$TPU:sae_jax.tar.gz" --worker=all &&
        on_all 'rm -rf sae_jax && mkdir sae_jax && tar -xzf sae_jax.tar.gz -C sae_jax && pip install --user --quiet uv &&
            python3 -m uv venv --quiet --allow-existing --python 3.13 ~/sae && cd sae_jax &&
            python3 -m uv pip install --quiet --python ~/sae/bin/python --constraint constraints/py313.txt ".[tpu,wandb]"'
    local code=$?
    rm -f "$archive"
    return $code
}

run() {
    # gcloud may leave with another code than the hosts: they keep theirs.
    local words
    words=$(printf '%q ' "$@")
    on_all "cd sae_jax && SAE_JAX_STOPPED_CODE=75 ~/sae/bin/sae-jax $words; code=\$?; echo \$code >~/sae.code; exit \$code"
}

was_stopped() { on_all 'cat sae.code' 2>/dev/null | grep -qx 75; }

delete() { tpus queued-resources delete "$TPU" --quiet --force; }

keep() {
    while true; do
        if [[ $(state) != ACTIVE ]]; then
            [[ -z $(state) ]] || delete || return
            create && setup || return
        fi
        run "$@" && return
        local code=$?
        # What fails while its slice is there, and was not stopped, fails by itself; a slice may be gone a moment later.
        sleep "$every"
        if [[ $(state) == ACTIVE ]] && ! was_stopped; then return $code; fi
        echo "tpu_vm.sh: $TPU is $(state), the command left with $code; it is repeated" >&2
        sleep "$every"
    done
}

case ${1:-} in
create | setup | run | keep | delete) "$@" ;;
state) state ;;
*)
    echo "usage: TPU=NAME ZONE=ZONE launch/tpu_vm.sh create | setup | run ... | keep ... | state | delete" >&2
    exit 2
    ;;
esac
