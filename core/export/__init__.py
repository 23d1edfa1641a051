"""Checkpoints in the formats of other runtimes.

An exporter is a function from a checkpoint's folder and an output path, which must not exist, to an
``Exported``. It raises a ``CheckpointError`` if the checkpoint is incomplete or corrupt, an
``UnsupportedModelError`` if its family is not supported, and an ``ExportError`` if the format does not fit
the model, or cannot be written.
"""
