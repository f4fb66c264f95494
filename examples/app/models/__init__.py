"""Models as they are found, and as they are used: folders, GGUF files, 4 bits, what S2-Attn and a text ask of them."""
