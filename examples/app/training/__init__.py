"""The parts of `finetune_llama.py`: its options, checks, data, model and Trainer, and what it reports."""
