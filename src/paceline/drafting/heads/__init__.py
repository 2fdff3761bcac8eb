"""Trained heads of a target: they read its hidden states and propose what follows. Loaded from the files of their authors."""
