"""Regenerate every table and figure of README.md, results/REPORT.md and docs/ from the runs recorded under results/.

python scripts/report.py            # overwrite tables that differ and all figures; so does `make figures`
python scripts/report.py --check    # write nothing; exit code 1 if a table differs from the runs
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis.figures import save
from analysis.report import PAGES, RESULTS, drawn, filled
from config import Parser, run_cli


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table differs")
    args = parser.parse_args()
    texts = {path: filled(path.read_text()) for path in PAGES}
    stale = [path for path, text in texts.items() if text != path.read_text()]
    if args.check:
        names = ", ".join(path.name for path in stale)
        print(f"{names}: differs from results/; run scripts/report.py" if stale else "the tables agree with results/")
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path])
    for name, figure in drawn():
        print(*save(figure, RESULTS / name))
    return 0


if __name__ == "__main__":
    run_cli(main, "report.py")
