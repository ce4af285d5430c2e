"""Tasks of the lm-evaluation-harness on a loaded model, and a sandbox for generated programs."""
