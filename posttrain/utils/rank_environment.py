"""Environment variables by which the launcher tells a rank what only the launcher knows."""

DEVICE = "POSTTRAIN_DEVICE"  # where to compute: "cuda" or "cpu"
STARTED = "POSTTRAIN_STARTED"  # when the command was started, in seconds of utils.boot_clock
UI_FD = "POSTTRAIN_UI_FD"  # file descriptor by which the first rank tells the launcher what to draw
