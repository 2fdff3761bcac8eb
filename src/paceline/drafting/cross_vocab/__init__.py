"""Drafting with a model that has another tokenizer: through text (`strings`), or within the shared vocabulary (`intersection`)."""
