"""A training run in one process: trainer, callbacks, batches, forward step, metrics."""
