"""The report of a study: figures and an HTML page, rendered from the tables."""
