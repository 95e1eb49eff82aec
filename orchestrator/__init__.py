"""Recipes that adapt a language model in stages, and the orchestrator that carries them out."""
