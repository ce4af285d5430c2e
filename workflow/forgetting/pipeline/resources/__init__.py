"""Seconds, memory, disk and processes of every job, from the study and the site."""
