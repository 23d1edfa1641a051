"""What a run is asked to do: one dataclass a section of a recipe, and recipes read into them."""
