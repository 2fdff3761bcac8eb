"""Drafts from the target's own weights: no second model, no training. One file a method; `session.py` has what they share."""
