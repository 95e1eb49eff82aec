"""Talks to what was learned: python launch/chat.py runs/instruct-…/adapter

    python launch/chat.py ARTIFACT… [--base BASE] [--template alpaca|chat|plain] [--max-tokens N] [--temperature T]

ARTIFACT is an adapter's folder or that of a model. Several adapters of one base share it, and are switched between without a
reload. A line is what you say, but for /use NAME (another adapter answers), /clear (what was said is forgotten) and /quit.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.errors import ModelError, OrchestratorError
from orchestrator.report.console import Console

if TYPE_CHECKING:
    from orchestrator.conversation import Conversation


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    # What libraries say of themselves when they are imported and used is not for a conversation.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Takes seconds, and --help does not wait for it.
    from orchestrator.conversation import Manner, open_conversation  # noqa: PLC0415

    try:
        manner = Manner(options.max_tokens, options.temperature, options.top_p, options.seed)
        conversation = open_conversation(options.artifacts, options.base, options.template, manner)
    except OrchestratorError as error:
        console.fail(str(error))
        return 2
    who = f", adapters {', '.join(conversation.names)}" if len(conversation.names) > 1 else ""
    console.note(f"template {conversation.template}{who}; /quit or Ctrl-D ends")
    _talk(conversation, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--base", type=Path, help="where the base lies now, if not where it was")
    parser.add_argument("--template", choices=["alpaca", "chat", "plain"], help="as it was trained, by default")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def _talk(conversation: "Conversation", console: Console) -> None:
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if said == "/quit":
                return
            if said == "/clear":
                conversation.turns.clear()
            elif said.startswith("/use"):
                conversation.use(said.removeprefix("/use").strip())
            elif said.startswith("/"):
                console.note("there is /use NAME, /clear and /quit")
            elif said:
                conversation.answer(said)
        except ModelError as error:
            console.note(str(error))
        except KeyboardInterrupt:
            # The answer ends, the conversation does not.
            print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
