"""`ipgo report`: the pages and tables of what is finished or not, again."""

from __future__ import annotations

from ipgo.cli_compare import show_comparison
from ipgo.terminal import command_parser, path_of


def report(argv: list[str]) -> int:
    """`ipgo report`: write the HTML report again."""
    parser = command_parser("report", "Write the HTML report of a run or a comparison, finished or not.")
    parser.add_argument("run", type=path_of, help="a run's folder, or a comparison's")
    args = parser.parse_args(argv)

    from ipgo.comparison import PLAN
    from ipgo.report import write_report
    from ipgo.store import Run

    if (args.run / PLAN).is_file():
        return show_comparison(args.run)
    print(write_report(Run.open(args.run))[0])
    return 0
