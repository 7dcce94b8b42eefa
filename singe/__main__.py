"""``python -m singe``."""

from singe.cli import main

main()
