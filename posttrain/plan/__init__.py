"""What a run needs before it starts: parameters, memory, time, and whether it fits. See posttrain.plan.__main__."""
