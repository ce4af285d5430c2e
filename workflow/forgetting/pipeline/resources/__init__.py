"""TODO pipeline.resources."""
