"""What a configuration means for a run, decided before anything heavy starts."""
