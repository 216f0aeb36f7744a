"""The demo: run the complete loop through the same public interfaces as any user."""
