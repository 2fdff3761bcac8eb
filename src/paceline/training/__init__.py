"""Training of drafts (not yet written)."""
