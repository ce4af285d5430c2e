"""From the records of all jobs to tidy tables."""
