"""Who builds a torch extension does it alone, and leaves no lock behind that others would wait for.

torch guards a build by a file that its builder removes. A builder that is killed leaves it, and from then on everyone who
wants the extension waits for a file that nobody will remove, without a word.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TORCH_LOCK = "lock"
"""What `torch.utils.cpp_extension` calls it; the builder keeps it open."""
_OWN_LOCK = "orchestrator.lock"


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Alone among our processes, in the folder of one extension, and with no lock of torch's that nobody holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _OWN_LOCK).open("w") as own:
        # The kernel lets go of this one, however its process ends.
        fcntl.flock(own, fcntl.LOCK_EX)
        left = folder / TORCH_LOCK
        if left.exists() and not _is_held(left):
            print(f"{left}: left by a process that was killed while it built there; removed")
            left.unlink(missing_ok=True)
        yield


def _is_held(path: Path) -> bool:
    """Whether a process of this user and machine has the file open, such as a training script that is not ours."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path.resolve()):
                return True
        except OSError:
            # It was closed meanwhile.
            continue
    return False
