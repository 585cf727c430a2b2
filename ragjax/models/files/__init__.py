"""Reading checkpoints: where they are, their configs, tokenizers and tensors."""
