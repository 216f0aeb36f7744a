"""The recipes that the platform ships, as TOML files named by recipe."""
