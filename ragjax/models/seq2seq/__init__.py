"""Encoder-decoders: T5 and BART, also as Fusion-in-Decoder."""
