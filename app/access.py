"""python -m app.access new NAME: see `app.auth`."""

from app.interruption import end_in_one_line

if __name__ == "__main__":
    end_in_one_line("python -m app.access")  # importing the rest takes seconds

import sys

from app.auth import main

if __name__ == "__main__":
    main(sys.argv[1:])
