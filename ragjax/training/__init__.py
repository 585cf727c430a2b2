"""The only place that differentiates and updates: steps, optimisers, checkpoints, the loop."""
