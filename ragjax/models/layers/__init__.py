"""Layers shared by the architectures, and the trees they are made of."""
