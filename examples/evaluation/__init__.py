"""The parts of `evaluate.py` and `generate.py`: a model to use, perplexity, retrieval, results that are not lost."""
