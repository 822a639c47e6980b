"""
Judges for the tests: a real OpenAI-compatible server (llama.cpp) whose tiny model prefers chosen characters, and a stub
for the replies that it cannot give.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

NUM_SPECIAL = 3  # <unk>, <s>, </s>; then one token a byte
EMBEDDING = 32


def write_model(path: Path, preferences: dict[str, float]) -> None:
    """A GGUF of one layer that adds nothing, so that every next byte has the same logits: `preferences`, 0 elsewhere."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(16_384)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(1)
    writer.add_feed_forward_length(EMBEDDING)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(NUM_SPECIAL + 256)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * (NUM_SPECIAL + 256))
    kind = gguf.TokenType
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *([kind.BYTE] * 256)])
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    embeddings = np.zeros((NUM_SPECIAL + 256, EMBEDDING), dtype=np.float32)
    embeddings[:, 0] = 1  # normalised to sqrt(EMBEDDING)
    output = np.zeros_like(embeddings)
    for character, logit in preferences.items():
        output[NUM_SPECIAL + ord(character), 0] = logit / np.sqrt(EMBEDDING)
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(EMBEDDING, dtype=np.float32))
    square = np.zeros((EMBEDDING, EMBEDDING), dtype=np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(EMBEDDING, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start_llama_server(folder: Path, preferences: dict[str, float]) -> str:
    """Start a judge in this process and return its base URL; it runs until the process ends."""
    path = folder / "model.gguf"
    write_model(path, preferences)
    return serve_gguf(path)


def serve_gguf(path: Path, name: str = "judge") -> str:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {name}
    params.use_jinja = True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.n_ctx = 32_768
    params.n_parallel = 2
    params.cpuparams.n_threads = 1
    params.port = 0
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    _running.append(server)
    return f"{server.listening_address}/v1"


_running: list = []


class StubJudge:
    """Answers each request with the next of `replies`, the last one for ever, and remembers what it was sent.

    A reply is an evaluation's JSON text, or (status, headers, body), or a dict that updates the choice, or "hang up", or
    "drip" (a byte now and then, for ever), or "echo" (a 400 that repeats the headers), or a function of the request that
    gives one of these.
    """

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests: list[dict] = []
        self.deleted: list[str] = []  # files
        self.lock = threading.Lock()

    def next_reply(self, request: dict):
        with self.lock:
            self.requests.append(request)
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return reply(request) if callable(reply) else reply

    def get(self, path: str):
        """What a GET of a path gives."""
        return {"object": "list", "data": [{"id": "base", "object": "model", "created": 0, "owned_by": "stub"}]}

    def post(self, path: str, body: bytes):
        """(status, headers, body), or "hang up", for a POST."""
        reply = self.next_reply(json.loads(body))
        return (
            reply if isinstance(reply, tuple) or reply in ("hang up", "drip", "echo") else (200, {}, completion(reply))
        )


class StubBatches(StubJudge):
    """Has the Batch API as well: each batch ends with the next of `ends` when it is looked at for the `looks`-th time.

    In a batch a reply may also be "unanswered", which is a request that it had not come to when it expired.
    """

    def __init__(self, *replies, ends: tuple[str, ...] = ("completed",), looks: int = 2):
        super().__init__(*replies)
        self.ends, self.looks = list(ends), looks
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.num_looks: dict[str, int] = {}

    def post(self, path: str, body: bytes):
        if path.endswith("/files"):
            file_id = f"file-{len(self.files)}"
            self.files[file_id] = body[body.index(b'{"custom_id"') : body.rindex(b"}\n") + 2]
            return 200, {}, {"id": file_id, "object": "file", "bytes": len(body), "created_at": 0, "filename": "x", "purpose": "batch", "status": "processed"}  # fmt: skip
        if path.endswith("/batches"):
            return 200, {}, self.create(json.loads(body))
        if path.endswith("/cancel"):
            batch = self.batches[path.split("/")[-2]]
            batch["status"] = "cancelled"
            return 200, {}, batch
        return super().post(path, body)

    def create(self, request: dict) -> dict:
        batch_id = f"batch-{len(self.batches)}"
        self.batches[batch_id] = {
            "id": batch_id, "object": "batch", "endpoint": request["endpoint"], "errors": None, "created_at": 0,
            "input_file_id": request["input_file_id"], "completion_window": "24h", "status": "validating",
            "output_file_id": None, "error_file_id": None, "metadata": request.get("metadata"),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        return self.batches[batch_id]

    def get(self, path: str):
        parts = path.split("?")[0].strip("/").split("/")
        if parts[-1] == "batches":
            return {"object": "list", "data": list(self.batches.values()), "has_more": False}
        if parts[-2] == "batches":
            return self.look_at(self.batches[parts[-1]]) if parts[-1] in self.batches else None
        if parts[-1] == "content":
            return self.files[parts[-2]].decode()
        return super().get(path)

    def look_at(self, batch: dict) -> dict:
        self.num_looks[batch["id"]] = self.num_looks.get(batch["id"], 0) + 1
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            if self.num_looks[batch["id"]] >= self.looks:
                self.end(batch)
        return batch

    def end(self, batch: dict) -> None:
        batch["status"] = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        if batch["status"] == "failed":
            batch["errors"] = {
                "object": "list",
                "data": [{"code": "invalid_json_line", "message": "line 1 is no JSON"}],
            }
            return
        done, failed = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            reply = self.next_reply(request["body"])
            row = {"id": "r", "custom_id": request["custom_id"], "response": None, "error": None}
            if reply == "unanswered":
                row["error"] = {
                    "code": "batch_expired",
                    "message": "This request could not be executed before it expired.",
                }
                failed.append(row)
            elif isinstance(reply, tuple):
                failed.append({**row, "response": {"status_code": reply[0], "request_id": "q", "body": reply[2]}})
            else:
                done.append({**row, "response": {"status_code": 200, "request_id": "q", "body": completion(reply)}})
        for kind, rows in (("output_file_id", done), ("error_file_id", failed)):
            if rows:
                batch[kind] = f"file-{len(self.files)}"
                self.files[batch[kind]] = "\n".join(json.dumps(row) for row in rows[::-1]).encode()  # in no order
        batch["request_counts"] = {"total": len(done) + len(failed), "completed": len(done), "failed": len(failed)}


class Handler(BaseHTTPRequestHandler):
    """Gives what `stub` gives."""

    stub: StubJudge

    def do_GET(self):
        found = self.stub.get(self.path)
        missing = 404, {}, {"error": {"message": "no such thing"}}
        self.reply(found if found == "drip" else missing if found is None else (200, {}, found))

    def do_POST(self):
        self.reply(self.stub.post(self.path, self.rfile.read(int(self.headers["Content-Length"]))))

    def do_DELETE(self):
        self.stub.deleted.append(self.path.split("/")[-1])
        self.reply((200, {}, {"id": "x", "object": "file", "deleted": True}))

    def reply(self, reply: str | tuple):
        if reply == "echo":
            reply = 400, {}, {"error": {"message": f"cannot read {dict(self.headers)}"}}
        if isinstance(reply, tuple):
            self.send(*reply)
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        if reply == "hang up":
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.close()
        elif reply == "drip":
            with contextlib.suppress(OSError):  # until the client has had enough
                for _ in range(1000):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

    def send(self, status: int, headers: dict, body: str | bytes | dict):
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(stub: StubJudge):
    """Serve a stub judge on 127.0.0.1 and give its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("StubHandler", (Handler,), {"stub": stub}))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # how soon it sees its end, in s
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()


def completion(reply: str | dict) -> dict:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
    if isinstance(reply, dict):
        message = {"role": "assistant", "content": None, **reply.get("message", {})}
        choice = {**choice, **reply, "message": message}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice], "usage": usage}


def evaluation(score: int) -> str:
    from finetuning.judge.form import Evaluation

    return json.dumps({criterion: {"explanation": "because", "score": score} for criterion in Evaluation.model_fields})
