"""Teachers of the retriever: what a language model, another model or a file thinks of passages."""
