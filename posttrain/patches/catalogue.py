"""The order in which patches are registered, and so applied."""
