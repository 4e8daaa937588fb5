"""A small server with llama-server's flags and dialect of HTTP, known delays, and faults on demand.

Tests run this file as a program of its own; it needs nothing but Python. What it does besides is in
the variable STAND_IN, a JSON object over the defaults below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BEHAVIOUR: dict[str, Any] = {
    "base_ms": 0,  # before the first token of any reply
    "token_ms": 0.0,  # more for each token that is not cached
    "usage": True,  # when include_usage asks for it
    "cached": True,  # tell how many tokens were
    "timings": True,
    "streams": True,
    "done": True,  # [DONE] at the end
    "junk": False,  # an event that is no JSON in each stream
    "field": "content",  # where the text of a delta stands
    "refuses": [],  # fields that are answered with 400
    "completions": True,
    "context": 0,  # tokens that are read of a prompt, the last ones; 0 is all
    "key": "",  # what clients must send
    "models": ["stand-in"],
    "moody": False,  # no reply is like another
    "faults": {},  # text in the last message or prompt: what happens then
    "starts": "",  # a file that gets a byte at each start
    "most_starts": 100,  # a start beyond that fails
}
CHARACTERS = 3
"""Of a token."""


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with kept connections and chunked streams, as llama-server has."""

    protocol_version = "HTTP/1.1"
    how: dict[str, Any]
    known: list[str]

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        elif self.path == "/props":
            self.answer(200, {"build_info": "b7825-e9fd8dc"})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": each} for each in self.how["models"]]})
        else:
            self.answer(404, {"error": {"message": "File Not Found"}})

    def do_POST(self) -> None:
        began = time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = self.path == "/v1/chat/completions"
        text = written(body)
        last = text.rpartition("<|im_start|>")[2]
        fault = next((f for words, f in self.how["faults"].items() if words in last), "")
        refused = [each for each in self.how["refuses"] if each in body]
        if fault == "die":
            os._exit(1)
        if self.how["key"] and self.headers["Authorization"] != f"Bearer {self.how['key']}":
            self.answer(401, {"error": {"message": "Invalid API Key"}})
        elif not is_chat and not self.how["completions"]:
            self.answer(404, {"error": {"message": "File Not Found"}})
        elif refused:
            self.answer(400, {"error": {"message": f"unknown field {refused[0]}"}})
        elif fault == "500":
            self.answer(500, {"error": {"message": "out of memory"}})
        else:
            self.reply(body, text, fault, began)

    def reply(self, body: dict[str, Any], text: str, fault: str, began: float) -> None:
        """Read the prompt for as long as it takes, then write three words about it."""
        text = text[-self.how["context"] * CHARACTERS :]
        cached = max((common(text, each) for each in self.known), default=0) // CHARACTERS
        prompt = len(text) // CHARACTERS
        cached = min(cached, prompt - 1)
        self.known.append(text)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": 3}
        if self.how["cached"]:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        timings = {"cache_n": cached, "prompt_n": prompt - cached, "predicted_n": 3}
        asked = (body.get("stream_options") or {}).get("include_usage")
        told: dict[str, Any] = {"usage": usage} if self.how["usage"] and asked else {}
        told |= {"timings": timings} if self.how["timings"] else {}
        words = hashlib.sha256(text.encode()).hexdigest()
        if self.how["moody"]:
            words = f"{time.monotonic_ns():024}"
        pieces = [words[:8], words[8:16], words[16:24]]
        ready = began + (self.how["base_ms"] + self.how["token_ms"] * (prompt - cached)) / 1000
        if self.how["streams"]:
            self.stream(pieces, told, fault, ready, is_chat="messages" in body)
            return
        time.sleep(max(0, ready - time.monotonic()))
        whole = "".join(pieces)
        choice = {"message": {"role": "assistant", "content": whole}}
        choice = choice if "messages" in body else {"text": whole}
        self.answer(200, {"choices": [{**choice, "finish_reason": "stop"}], **told})

    def stream(
        self, pieces: list[str], told: dict[str, Any], fault: str, ready: float, *, is_chat: bool
    ) -> None:
        """The same in events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if is_chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        while fault in ("hang", "pings"):
            time.sleep(0.05)
            if fault == "pings":
                self.chunk(":\n\n")
        time.sleep(max(0, ready - time.monotonic()))
        for piece in pieces:
            choice = {"delta": {self.how["field"]: piece}} if is_chat else {"text": piece}
            self.event({"choices": [{"index": 0, **choice}]})
            if fault == "half":
                self.close_connection = True
                return
            if fault == "error":
                self.event({"error": {"message": "slot unavailable"}})
        if self.how["junk"]:
            self.chunk("event: progress\ndata: 97 %\n\n")
        end = {"delta": {}} if is_chat else {"text": ""}
        self.event({"choices": [{"index": 0, **end, "finish_reason": "stop"}]})
        if told:
            self.event({"choices": [], **told})
        if self.how["done"]:
            self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, data: dict[str, Any]) -> None:
        self.chunk(f"data: {json.dumps(data)}\n\n")

    def chunk(self, text: str) -> None:
        content = text.encode()
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        pass


def written(body: dict[str, Any]) -> str:
    """The prompt as one text, tools first, as ChatML templates have it."""
    if "messages" not in body:
        return str(body["prompt"])
    tools = json.dumps(body["tools"]) if body.get("tools") else ""
    turns = [
        f"<|im_start|>{message['role']}\n{message.get('content') or ''}"
        f"{json.dumps(message.get('tool_calls') or '')}<|im_end|>\n"
        for message in body["messages"]
    ]
    return tools + "".join(turns)


def common(one: str, other: str) -> int:
    """Characters that two texts have in common from their beginning, found by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--model")
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-ctxcp", "--ctx-checkpoints", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    if options.version:
        print("version: 7825 (e9fd8dc)\nbuilt for a test", file=sys.stderr)
        return
    how = {**BEHAVIOUR, **json.loads(os.environ.get("STAND_IN", "{}"))}
    if how["starts"]:
        with open(how["starts"], "ab") as starts:  # noqa: PTH123
            starts.write(b".")
        if os.path.getsize(how["starts"]) > how["most_starts"]:  # noqa: PTH202
            sys.exit("error: failed to load model")
    Handler.how, Handler.known = how, []
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
