"""A command's words, written so that they arrive as they were given.

KubeRay puts the entrypoint into a shell script of its submitter as it stands; there `ray job submit` joins the words anew
by the rules of Windows (`subprocess.list2cmdline`), and Ray's job server gives the result to `sh`. So what `sh` would act
on has to survive the first shell, and what the joining does to quotes and spaces is counted on.
"""

import re
import shlex
from collections.abc import Sequence

_BACKSLASH = r'\\(?!\\*"|\\*$)'
"""Those in front of a quotation mark, and the last ones of a word with spaces, the joining doubles itself."""
_IN_QUOTES = re.compile(rf"{_BACKSLASH}|[$`]")
_BARE = re.compile(r"""\\(?!\\*")|[|&;<>()$`'*?\[\]#~{}!^]""")


def entrypoint_of(words: Sequence[str]) -> str:
    """One line; ordinary words stand in it as they would be typed."""
    return shlex.join([_for_the_second_shell(word) for word in words])


def _for_the_second_shell(word: str) -> str:
    # The joining puts words with spaces, and empty ones, into double quotes.
    special = _IN_QUOTES if " " in word or "\t" in word else _BARE
    return special.sub(lambda match: "\\" + match[0], word)
