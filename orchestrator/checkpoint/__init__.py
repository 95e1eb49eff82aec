"""What is saved, and how it is found again."""
