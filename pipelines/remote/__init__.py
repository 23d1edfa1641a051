"""Kubeflow Pipelines from outside: submit, schedule, follow."""
