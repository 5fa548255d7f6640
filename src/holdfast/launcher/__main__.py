"""``python -m holdfast.launcher`` is ``holdfast run``."""

import sys

from holdfast.launcher.run import main

if __name__ == "__main__":
    sys.exit(main())
