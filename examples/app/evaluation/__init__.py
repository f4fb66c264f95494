"""The parts of `evaluate.py`: perplexity, retrieval, and results that are kept when it is interrupted."""
