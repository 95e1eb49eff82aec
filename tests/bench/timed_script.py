"""Runs a script as Python itself would, and writes down when: python timed_script.py FILE SCRIPT [argument…]

So a launcher's own start counts to what the script measures from its first line on.
"""

import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(repr(time.time()), encoding="ascii")
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
