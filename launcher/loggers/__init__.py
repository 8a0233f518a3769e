"""Where a run's figures are shown: TensorBoard, Weights & Biases, MLflow."""
