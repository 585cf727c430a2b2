"""Metrics of a run beside `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio."""
