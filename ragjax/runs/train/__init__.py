"""The training stages of a run."""
