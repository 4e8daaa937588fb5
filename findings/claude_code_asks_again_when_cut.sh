#!/bin/sh
# @anthropic-ai/claude-code 2.1.197 (Linux, node 20): a reply that ends with stop_reason `max_tokens` is asked for four
# times: the same prompt, then three times more with what was written and a request to go on behind it. Then the
# question has failed (exit status 1).
#
# A server that reads prompts anew reads all of it four times for one question: the first body has 24 tools and 78 KB
# (tens of thousands of tokens). The first block of its system prompt is a line of attribution that is the same for
# all four; the client's version is in it, so an update makes everything behind it another prompt.
#
# Not part of CI: it installs packages. Exits with 1 when what it sees has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
npm install --silent --no-audit --no-fund --prefix "$folder" "@anthropic-ai/claude-code@2.1.197" >/dev/null
mkdir "$folder/home"
FOLDER=$folder python3 - <<'PYTHON'
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked = []


class Cut(BaseHTTPRequestHandler):
    """Anthropic's Messages: every reply is one word, and is cut there."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "count_tokens" in self.path:
            return self.answer("application/json", json.dumps({"input_tokens": 9}).encode())
        asked.append(body)
        usage = {"input_tokens": 9, "output_tokens": 1}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": [],
                   "stop_reason": None, "stop_sequence": None, "usage": usage}
        events = [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Well"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "max_tokens", "stop_sequence": None}, "usage": usage},
            {"type": "message_stop"},
        ]
        said = "".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events)
        self.answer("text/event-stream", said.encode())

    def answer(self, kind, said):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


folder = os.environ["FOLDER"]
server = ThreadingHTTPServer(("127.0.0.1", 0), Cut)
threading.Thread(target=server.serve_forever, daemon=True).start()
done = subprocess.run(
    [f"{folder}/node_modules/.bin/claude", "-p", "What is a lamp?"],
    cwd=f"{folder}/home", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    env={"PATH": os.environ["PATH"], "HOME": f"{folder}/home", "ANTHROPIC_AUTH_TOKEN": "none",
         "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "*",
         "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"},
)
main = [body for body in asked if body.get("tools")]
messages = [len(body["messages"]) for body in main]
first = main[0]["system"][0]["text"].split(":")[0]
heads = {json.dumps(body["system"]) for body in main}
size = len(json.dumps(main[0]))
print(f"exit status {done.returncode}; requests with tools: {len(main)}, of so many messages: {messages}")
print(f"tools {len(main[0]['tools'])}, {size:,} bytes; system begins with {first!r}, in {len(heads)} form(s)")
as_seen = (
    done.returncode == 1
    and len(main) == 4
    and messages == [messages[0] + 2 * n for n in range(4)]
    and first == "x-anthropic-billing-header"
    and len(heads) == 1
    and size > 60_000
)
print("as seen" if as_seen else "CHANGED: a reply that is cut is asked for otherwise")
sys.exit(not as_seen)
PYTHON
