"""A run over HTTP: search, answers, embeddings, and a page to ask in."""
