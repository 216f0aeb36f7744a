"""The embedded stack: its services and stores, what one home folder keeps of it, and what can be wrong with it."""
