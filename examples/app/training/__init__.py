"""The parts of `finetune_llama.py`: its options, what it refuses, its schedule of attention, what it reports."""
