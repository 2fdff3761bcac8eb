"""The OpenAI-compatible server (not yet written)."""
