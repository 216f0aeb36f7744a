"""The demo: one whole round through the same doors as any user."""
