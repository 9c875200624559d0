"""Which layers' activations go to the host's memory; for the model (offloaded_activations.py) and the plan."""

SMALLEST = 2**20  # bytes; what is less stays where it is
AWAY = 2  # chosen layers that are on the device at a time: on their way from it, or to it


def chosen_layers(total: int, count: int) -> list[bool]:
    """Which layers are chosen: `count` of them, spread evenly from the first on."""
    return [number * count % total < count for number in range(total)]
