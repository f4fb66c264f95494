"""The tiny Llama: its model and tokenizer, the text that it sees, and its card."""
