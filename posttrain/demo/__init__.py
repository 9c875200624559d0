"""What the default run needs and no hub provides: a small real model and an instruction set, both made locally."""
