"""TODO study."""
