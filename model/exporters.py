"""python -m model.exporters SRC DST: see `model.convert.exporter`."""

import sys

from model.convert.exporter import ExportRefused, export, main

__all__ = ["ExportRefused", "export", "main"]

if __name__ == "__main__":
    sys.exit(main())
