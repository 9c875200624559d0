"""`python -m posttrain.report DIR`: a sweep, or one run, on the terminal and as a page."""

import argparse
from pathlib import Path

from posttrain.errors import UserError
from posttrain.report import write_report
from posttrain.report.trials import READING
from posttrain.utils import stop, working
from posttrain.utils.escape import escape_control
from posttrain.utils.stop import fail


@stop.command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.report", description=__doc__)
    parser.add_argument("directory", type=Path, help="of a sweep, or of a run")
    parser.add_argument("--out", type=Path, help="where to write the page (default: DIR/report.html)")
    args = parser.parse_args()
    working.begin(READING)
    try:
        print(escape_control(f"\n{write_report(args.directory, args.out)}"))
    except UserError as error:
        fail(str(error), error.exit_code)


if __name__ == "__main__":
    main()
