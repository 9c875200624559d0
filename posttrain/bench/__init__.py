"""`python -m posttrain.bench`: this project's training speed on one GPU beside that of others, in one run."""
