"""The community loop: who reports what, what became of it, which version fixed it."""
