"""Reading a study file, checking it before any job, and planning its runs."""
