"""The steps of the pipeline as KFP components, one file each, thin over ``core.steps``."""
