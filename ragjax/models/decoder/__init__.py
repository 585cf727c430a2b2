"""Causal decoders: Llama, SmolLM2, Mistral, Qwen, Gemma 3."""
