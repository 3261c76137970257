"""Entry point of the measurement of what token statistics cost; run as a file (`python bench/stats_overhead.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]
    from bench.token_stats import main

    main()
