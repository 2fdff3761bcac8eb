"""Training of what drafts: answers that a model gives to itself or that are read from files, and what is counted from them."""
