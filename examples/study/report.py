"""Makes the tables and plots from the results, and puts the tables into README.md.

python examples/study/report.py                  # from results/*.jsonl, into README.md and its figures
python examples/study/report.py --results quick.jsonl --print
"""

import argparse
import re
from pathlib import Path

from run import HERE, read
from tables import TABLES

MARK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="*", help="files of results; all of results/ if not given")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    arguments = parser.parse_args()
    rows = read(arguments.results or sorted((HERE / "results").glob("*.jsonl")))
    if arguments.print:
        for name, table in TABLES.items():
            print(f"\n## {name}\n\n{table(rows)}")
        return
    from plots import PLOTS

    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), rows))
    for name, plot in PLOTS.items():
        plot(rows, HERE / f"{name}.png")


def fill(text: str, rows: list[dict]) -> str:
    """The text with every block between marks made anew."""
    return MARK.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]](rows)}\n<!-- end -->", text)


if __name__ == "__main__":
    main()
