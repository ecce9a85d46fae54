"""Meaning to decision: actors, questions, answers, and what is let through."""
