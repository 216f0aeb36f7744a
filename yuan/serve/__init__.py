"""The internal model server: the OpenAI API for one model folder."""
