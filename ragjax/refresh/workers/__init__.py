"""Encoding shared among worker processes that see one folder."""
