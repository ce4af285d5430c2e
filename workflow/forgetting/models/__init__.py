"""Base models, adapters, and tuned models on disk."""
