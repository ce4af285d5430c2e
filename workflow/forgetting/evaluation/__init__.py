"""Evaluation of a model on probes, general text and harmful prompts."""
