"""Training on several nodes: a TrainJob of Kubeflow Trainer, made and followed by recover-train."""
