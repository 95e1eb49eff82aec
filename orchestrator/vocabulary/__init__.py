"""Vocabularies: training SentencePiece models, merging them, and what a merge costs and brings."""
