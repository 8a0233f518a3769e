"""Rank layout, DeepSpeed engine and layout-free checkpoints."""
