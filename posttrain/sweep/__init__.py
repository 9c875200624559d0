"""Grids and searches: `--multirun`. Where trials live, which are still to do, how many run at once."""
