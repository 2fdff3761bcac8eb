"""Controllers: plain Python that decides how much to draft, with what, and when not to."""
