"""The internal model server: the OpenAI API over one model folder."""
