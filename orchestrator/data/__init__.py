"""Text and instructions, from published files to batches of tokens."""
