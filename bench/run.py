"""Entry point of `make bench`; run as a file (`python bench/run.py`), never with `-m`: see CONTRIBUTING.

A module run from the checkout would see the checkout's folders before the installed packages; here they come last.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]
    from bench.main import app

    app()
