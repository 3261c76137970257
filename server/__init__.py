"""The OpenAI-compatible server around the strategies; import its modules by name."""

__version__ = "0.1.0"
