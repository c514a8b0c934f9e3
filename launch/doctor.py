"""Says what is missing or does not fit on this machine, and what to do: `python launch/doctor.py`.

Exit code 0 if a run can start, 3 if not. `--prepare` only reports what stops a run and leaves every package imported
once, so that their compiled files are there (`make install` calls it). `--output` is where runs will be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quietgoose.base.errors import ExitCode, RecipeError
from quietgoose.base.options import OneLineParser
from quietgoose.train.diagnosis import examine


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(prog="doctor", description="What is missing on this machine, and what to do.")
    parser.add_argument("--output", default="runs", type=Path, help="folder for runs (default: runs)")
    parser.add_argument("--prepare", action="store_true", help="print only what stops a run")
    try:
        arguments = parser.parse_args(argv)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    findings = examine(arguments.output)
    stopping = [finding for finding in findings if finding.state == "missing"]
    for finding in stopping if arguments.prepare else findings:
        mark = {"ok": "OK  ", "note": "NOTE", "missing": "STOP"}[finding.state]
        print(f"{mark} {finding.name}: {finding.found}{f'. {finding.fix}' if finding.fix else ''}")
    if stopping:
        print(f"QG-ENV-001 {len(stopping)} of {len(findings)} things stop a run", file=sys.stderr)
        return int(ExitCode.ENVIRONMENT)
    if not arguments.prepare:
        print("A run can start. Try: make demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
