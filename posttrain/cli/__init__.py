"""A command line becomes a checked configuration, and a task runs with it."""
