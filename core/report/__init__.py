"""What a person reads of a run: the report, its pictures, the model card."""
