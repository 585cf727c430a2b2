"""Complete runs made of the other subpackages: dual training from documents to a table."""
