"""How a data set is read: what a command line can say about it beside its name and the size of its images."""

from __future__ import annotations

from dataclasses import dataclass

LABEL_SOURCES = ("auto", "folder", "filename", "prefix")
DEPTHS = (0, 8, 10, 12, 14, 16)


@dataclass(frozen=True)
class LoadOptions:
    """The defaults suit nearly every data set. Raises ValueError on what makes no sense."""

    label_from: str = "auto"  # see training.data.labels
    label_column: str = ""  # of a table
    skip_broken: bool = False  # leave out images that cannot be read
    max_megapixels: int = 179  # of one image; Pillow's own limit
    grey_bits: int = 0  # of 16-bit greys that are in use; 0: as measured

    def __post_init__(self) -> None:
        if self.label_column and self.label_from != "auto":
            raise ValueError("--label_column and --label_from say where the class stands in two ways: give one of them")
        if self.max_megapixels < 1:
            raise ValueError(f"--max_megapixels must be at least 1, not {self.max_megapixels}")
        if self.grey_bits not in DEPTHS:
            raise ValueError(f"--grey_bits must be one of {', '.join(map(str, DEPTHS))}, not {self.grey_bits}")
