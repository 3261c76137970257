"""Reasoning strategies over one Engine protocol; nothing here knows HTTP, vLLM or torch."""
