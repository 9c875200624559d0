"""`python -m posttrain.bench`: training speed on one GPU, this project's and others', in one run."""
