#!/usr/bin/env bash
# What one H100 or H200 is asked, in parts of under ten minutes each.
#
#     experiments/benchmarks/gpu.sh OUT tests kernels steps dead       # these parts, one after another
#     experiments/benchmarks/gpu.sh --smoke OUT                        # every part at toy sizes, on any machine
#
# Parts: tests kernels steps dead variants peers harvest papers. Each writes OUT/PART.log from its first line and
# OUT/PART.json as it goes, so that a part which is cut off leaves what it has. SECONDS_EACH (540) is the longest that a
# part may take. The environment has sae_jax and, for peers, its extra `bench` and torch; PYTHON names the interpreter.
set -u

smoke=""
if [ "${1:-}" = "--smoke" ]; then smoke="--smoke"; shift; fi
out=${1:?give a folder for what is measured}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
failed=0

# run PART COMMAND...: what it says goes to the part's log, and its end to the screen.
run() {
  local part=$1 began=$SECONDS
  shift
  timeout "${SECONDS_EACH:-540}" "$@" >>"$out/$part.log" 2>&1
  local code=$?
  [ $code = 0 ] || failed=1
  echo "$part: exit code $code after $((SECONDS - began)) s; $out/$part.log"
  return $code
}

bench() { # bench PART SCRIPT FLAGS...
  local part=$1 script=$2
  shift 2
  run "$part" "$python" "experiments/benchmarks/$script" --out "$out/$part.json" "$@" $smoke
}

demo_set() { # the rows that experiments learn from, harvested once
  [ -n "$smoke" ] || [ -e "$out/set" ] ||
    run papers "$python" -m sae_jax.commands.main harvest configs/scaling_laptop.yaml --out "$out/set"
}

paper() { # paper SCRIPT FLAGS...: the flags are those of the full size
  local script=$1
  shift
  if [ -n "$smoke" ]; then set -- --smoke; else set -- --data "$out/set" "$@"; fi
  run papers "$python" "experiments/$script" --out "$out/${script%.py}" "$@"
}

part() {
  case $1 in
    tests)
      local which="tests/ops"
      [ -z "$smoke" ] || which="tests/ops/test_mixing.py"
      run tests "$python" -m pytest -q -p no:cacheprovider "$which"
      run tests "$python" -m sae_jax.commands.main selftest --out "$out/selftest"
      ;;
    kernels) bench kernels kernels.py ;;
    steps) bench steps whole_step.py --only default average clipping moments kernels blocks ;;
    dead) bench dead whole_step.py --sizes A --only default dead ;;
    variants) bench variants whole_step.py --only default batch matryoshka jumprelu ;;
    peers) bench peers step.py --n-latents 131072 --batch-size 8192 --rows 376832 --lr 7e-5 --rounds 3 ;;
    harvest) bench harvest harvest.py ;;
    papers)
      demo_set
      paper dead_latents.py --n-latents 32768 --k 16 --batch-size 1024 --rate 5e-4 --steps 4880 --window 1000000 \
        --kinds both all_rows neither &
      paper progressive_codes.py --k 8 --steps 2000 &
      paper learning_rate.py --batch-size 8192 &
      paper end_to_end.py --k 16 --n-latents 2048 --batch-size 2048 --steps 1500 --rates 3e-3 \
        --kinds local 'end to end' &
      for job in $(jobs -p); do wait "$job" || failed=1; done
      ;;
    *) echo "no part $1; there are: tests kernels steps dead variants peers harvest papers" >&2; exit 2 ;;
  esac
}

[ $# -gt 0 ] || set -- tests kernels steps dead variants peers harvest papers
for each in "$@"; do part "$each"; done
exit $failed
