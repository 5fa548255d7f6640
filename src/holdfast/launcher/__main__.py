"""``python -m holdfast.launcher`` is ``holdfast run``."""

import sys

from holdfast.launcher.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
