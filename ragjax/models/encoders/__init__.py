"""Text-encoder architectures."""
