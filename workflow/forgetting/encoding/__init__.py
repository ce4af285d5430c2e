"""From rows to tokens."""
