"""Drafters: each proposes a chain or a tree, with or without the distribution it was drawn from."""
