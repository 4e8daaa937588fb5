"""What can have changed between two requests, in words for whoever writes the client."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What changed. Each has a sentence that says so, and one that says what to do about it."""

    SAME = "same"
    APPENDED = "appended"
    REWOUND = "rewound"
    DATE = "date"
    ID = "id"
    PATH = "path"
    ATTRIBUTION = "attribution"
    REPOSITORY = "repository"
    NUMBER = "number"
    TOOL_ORDER = "tool_order"
    KEY_ORDER = "key_order"
    TOOL_ADDED = "tool_added"
    TOOL_REMOVED = "tool_removed"
    TOOL_EDITED = "tool_edited"
    SYSTEM_EDITED = "system_edited"
    MESSAGE_EDITED = "message_edited"
    MESSAGE_INSERTED = "message_inserted"
    MESSAGES_REMOVED = "messages_removed"
    HISTORY_REWRITTEN = "history_rewritten"
    REASONING_STRIPPED = "reasoning_stripped"
    REASONING_NOT_RENDERED = "reasoning_not_rendered"
    RESULT_EDITED = "tool_result_edited"
    RESULT_SHORTENED = "tool_result_shortened"
    ARGUMENTS = "template_arguments"
    PROMPT_EDITED = "prompt_edited"
    BRANCHED = "branched"
    OTHER_SALT = "other_salt"
    OTHER_MODEL = "other_model"
    NOT_CACHED = "not_cached"
    UNKNOWN = "unknown"

    @property
    def sentence(self) -> str:
        """What changed."""
        return _SAID[self].sentence

    @property
    def advice(self) -> str:
        """What to do about it in the client."""
        return _SAID[self].advice

    @property
    def is_hot(self) -> bool:
        """Whether nothing is wrong: what was read before is not read again because of it."""
        return self in (Kind.SAME, Kind.APPENDED, Kind.REWOUND)


@dataclass(frozen=True, slots=True)
class _Said:
    sentence: str
    advice: str


_BEHIND = "Put it into the last user message, behind all that stays, or leave it out."

_SAID = {
    Kind.SAME: _Said("Both prompts are the same.", "Nothing: only the last token is read again."),
    Kind.APPENDED: _Said(
        "The second prompt goes on where the first one ended.",
        "Nothing: this is how a history stays hot.",
    ),
    Kind.REWOUND: _Said(
        "The second prompt is a beginning of the first one.",
        "Nothing, unless the client did not mean to go back.",
    ),
    Kind.DATE: _Said(
        "A date or a time changed.",
        f"Write the day at most, never the time. {_BEHIND}",
    ),
    Kind.ID: _Said(
        "An id changed, such as a UUID or a hash.",
        f"Draw it once for a session, if the model must know it at all. {_BEHIND}",
    ),
    Kind.PATH: _Said(
        "A path changed.",
        f"Use the same directory for the same work; a new one for each run changes each prompt. {_BEHIND}",
    ),
    Kind.ATTRIBUTION: _Said(
        "A line of attribution or billing changed.",
        "Have the client send it as a header, or switch it off. Claude Code: "
        "CLAUDE_CODE_ATTRIBUTION_HEADER=0.",
    ),
    Kind.REPOSITORY: _Said(
        "What git says of the working tree changed.",
        f"Let the model ask for it with a tool. {_BEHIND}",
    ),
    Kind.NUMBER: _Said(
        "A number changed, such as a counter.",
        f"Do not count in what stands before the conversation. {_BEHIND}",
    ),
    Kind.TOOL_ORDER: _Said(
        "The tools came in another order.",
        "Sort them by name before each request: sets and maps have no order of their own.",
    ),
    Kind.KEY_ORDER: _Said(
        "The keys of an object came in another order.",
        "Write JSON with its keys in one order: sort them, or keep what was sent or received before.",
    ),
    Kind.TOOL_ADDED: _Said(
        "A tool was added.",
        "Offer all tools from the first request on, and choose with tool_choice, which leaves the prompt "
        "as it is.",
    ),
    Kind.TOOL_REMOVED: _Said(
        "A tool was left out.",
        "Go on offering it, and choose with tool_choice, which leaves the prompt as it is.",
    ),
    Kind.TOOL_EDITED: _Said(
        "A tool's description or schema changed.",
        "Keep a tool's text the same for a session; what changes belongs into its result, or the last "
        "user message.",
    ),
    Kind.SYSTEM_EDITED: _Said(
        "The system prompt changed.",
        "Keep it the same for a session, and put what changes into the last user message.",
    ),
    Kind.MESSAGE_EDITED: _Said(
        "A message of the history changed.",
        "Send a history as it was sent and received before: only what is appended is new.",
    ),
    Kind.MESSAGE_INSERTED: _Said(
        "A message was put in between others.",
        "Append it behind the last one: all that stands behind a place of change is read again.",
    ),
    Kind.MESSAGES_REMOVED: _Said(
        "Messages were left out of the history.",
        "Drop old turns seldom and many at once, not one with each request: each time the rest is read "
        "again.",
    ),
    Kind.HISTORY_REWRITTEN: _Said(
        "The history was replaced by a shorter one, such as a summary.",
        "Compact seldom: the new history is read once, and is hot from then on.",
    ),
    Kind.REASONING_STRIPPED: _Said(
        "An earlier turn's reasoning is not sent as it was.",
        "Send it back with its turn, as reasoning_content, a thinking block or a reasoning item, at least "
        "until the next user message.",
    ),
    Kind.REASONING_NOT_RENDERED: _Said(
        "The model's chat template leaves out the reasoning of turns before the last user message.",
        "Nothing in the history. Where it costs much, switch reasoning off for such turns, or use a template "
        "that keeps it.",
    ),
    Kind.RESULT_EDITED: _Said(
        "A tool's earlier result changed.",
        "Send a result as it was sent before, also where the tool would say something else by now.",
    ),
    Kind.RESULT_SHORTENED: _Said(
        "A tool's earlier result was shortened.",
        "Shorten a result before it is sent for the first time, or never.",
    ),
    Kind.ARGUMENTS: _Said(
        "Arguments of the chat template changed, such as whether the model is to think.",
        "Keep chat_template_kwargs, reasoning_effort and the switches of thinking the same for a session.",
    ),
    Kind.PROMPT_EDITED: _Said(
        "The text of the prompt changed.",
        "Keep its beginning the same, and put what changes at its end.",
    ),
    Kind.BRANCHED: _Said(
        "The prompt leaves what is stored within a message.",
        "Nothing, if another conversation begins there. Else send the history as it was sent and received "
        "before.",
    ),
    Kind.OTHER_SALT: _Said(
        "The requests have different salts, and those share nothing.",
        "Send the same cache_salt with each request that may share.",
    ),
    Kind.OTHER_MODEL: _Said(
        "The requests are for different models, and those share nothing.",
        "Name the same model with each request of a session, for titles and summaries too.",
    ),
    Kind.NOT_CACHED: _Said(
        "The request asked to be read without the cache.",
        "Leave out cache_prompt: false.",
    ),
    Kind.UNKNOWN: _Said(
        "The prompts part ways at something that is not known by name.",
        "Compare the letters where they part: the beginning of a prompt must be the same to the letter.",
    ),
}
