"""Answering questions from a corpus: retrieval, reading, attribution, display."""
