"""python -m model.exporters SRC DST: see `model.convert.exporter`."""

import sys

from model.convert.exporter import UnsupportedExportError, export, main

__all__ = ["UnsupportedExportError", "export", "main"]

if __name__ == "__main__":
    sys.exit(main())
