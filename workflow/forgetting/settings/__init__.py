"""What is asked: the study file, read, checked and planned."""
