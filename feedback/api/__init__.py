"""The portal: JSON API, OpenAI-compatible API, and web pages."""
