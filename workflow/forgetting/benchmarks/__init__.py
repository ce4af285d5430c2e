"""The lm-evaluation-harness on a loaded model, and the programs that models write for it."""
