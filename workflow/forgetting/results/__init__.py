"""Tables of results, built from the records of all jobs."""
