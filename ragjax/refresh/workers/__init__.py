"""Encoding in processes of a cluster."""
