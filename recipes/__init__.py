"""Trainings with swapped norms. From a clone: `python -m recipes.glue --help`."""
