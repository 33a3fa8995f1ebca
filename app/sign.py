"""ddpm-serve sign ADDRESS …: addresses of images that need no API key until they expire. See `app.signing`."""

from app.interruption import end_in_one_line

if __name__ == "__main__":
    end_in_one_line("python -m app.sign")  # importing the rest takes seconds

import argparse
import re
import sys

from pydantic import ValidationError

from app.settings import Settings, complaints_about
from app.signing import image_access

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """3600, 60m, 24h or 7d. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no time: write 3600, 60m, 24h or 7d")
    return int(found[1]) * UNITS[found[2] or "s"]


def main(argv: list[str]) -> None:
    """Prints each address, signed, on a line of its own. Exits with a sentence where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m app.sign", description="Signs addresses of images, so that they need no API key for a while."
    )
    parser.add_argument("address", nargs="+", help="/images/… or https://…/images/…, as you would fetch it")
    parser.add_argument("--valid", type=seconds, default=86_400, help="how long: 3600, 60m, 24h or 7d (default 24h)")
    parser.add_argument("--signing-key-file", default="", help="the server's; left out, DDPM_SIGNING_KEY or …_FILE")
    given = parser.parse_args(argv)
    try:
        settings = Settings(**({"signing_key_file": given.signing_key_file} if given.signing_key_file else {}))
        signer = image_access(settings, keys_required=True).signer
        if signer is None:
            raise ValueError("there is no signing key: name the server's with --signing-key-file")
        signed = [signer.sign(address, given.valid) for address in given.address]
    except ValidationError as error:  # of a variable that has nothing to do with this
        sys.exit("python -m app.sign: " + "; ".join(complaints_about(error, Settings)))
    except ValueError as error:
        sys.exit(f"python -m app.sign: {error}")
    print("\n".join(signed))


if __name__ == "__main__":
    main(sys.argv[1:])
