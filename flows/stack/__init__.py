"""The embedded stack: its services and stores, the configuration in its home folder, and its health checks."""
