"""The portal: JSON API, OpenAI doorway and pages."""
