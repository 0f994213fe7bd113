"""One script for each model of the zoo: `python -m minillm.recipes.<name>` makes it again."""
