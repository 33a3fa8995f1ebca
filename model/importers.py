"""python -m model.importers SRC DST: see `model.convert.importer`."""

import sys

from model.convert.importer import import_path, load_weights, main, recognise

__all__ = ["import_path", "load_weights", "main", "recognise"]

if __name__ == "__main__":
    sys.exit(main())
