"""What is known and what is new: tables, read and checked row by row."""
