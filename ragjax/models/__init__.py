"""Text encoders and language models, and the loaders of their checkpoints."""
