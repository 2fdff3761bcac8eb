"""Loading: Hugging Face folders and hub names, GGUF files, the embedded default; tokenizers and their comparison."""
