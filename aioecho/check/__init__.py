"""Checks of a handler: played conversations that look for the mistakes which only a network shows.

It needs the extra `check`: pip install "aioecho[check]".
"""

from aioecho.check.conversation import Conversation, Whole, default_conversation, parse_script
from aioecho.check.run import CHECKS, Result, check
from aioecho.check.subject import Finding

__all__ = ["CHECKS", "Conversation", "Finding", "Result", "Whole", "check", "default_conversation", "parse_script"]
