"""Verification rules: pure functions of the target's rows and a draft."""
