"""One picture of several benchmarks: accuracy against forward passes, a panel for each run or comparison.

python -m eval.picture docs/images/benchmarks.png "quickstart=runs/quickstart" "MNNS=runs/compare-mnns"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_sft.evaluation import plots
from latent_sft.runs import read_json, write_atomically


def rows_of(title: str, directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's or a comparison's test split (else validation), their split named `title`."""
    comparison = directory / "comparison.json"
    if comparison.exists():
        rows = read_json(comparison)["rows"]
    else:
        rows = read_json(directory / "report" / "report.json")["results"]
    return [{**row, "split": title} for row in rows if row["split"] == rows[0]["split"]]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(prog="python -m eval.picture", description=__doc__)
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("benchmarks", nargs="+", metavar="TITLE=DIR", help="run directory of each panel")
    args = parser.parse_args(argv)
    panels = [benchmark.partition("=") for benchmark in args.benchmarks]
    rows = [row for title, _, directory in panels for row in rows_of(title, Path(directory))]
    figure = plots.accuracy_against(rows, plots.PASSES)
    assert figure is not None
    write_atomically(args.out, plots.to_bytes(figure, "png"))


if __name__ == "__main__":
    main()
