"""Hub ids: downloads, revisions and the cache, tested against a local server with the hub's file API."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests._support import hub_layout as hub

COMMITS = {"main": "a" * 40, "v1": "b" * 40}  # v1 has a separate head, main is tied


class Hub(BaseHTTPRequestHandler):
    """Serves /api/models/{id}/revision/{rev}, /api/models/{id}/tree/{commit} and /{id}/resolve/{commit}/{file}."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool):
        self.server.requests.append(f"{self.command} {self.path}")
        path, repo = self.path.partition("?")[0], "acme/tiny"
        status, headers, content = 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        for revision, commit in COMMITS.items():
            files = self.server.files[commit]
            if path in (f"/api/models/{repo}/revision/{name}" for name in (revision, commit)):
                siblings = [{"rfilename": name} for name in files]
                status, headers, content = (
                    200,
                    {},
                    json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(),
                )
            elif path == f"/api/models/{repo}/tree/{commit}":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files.items()
                ]
                status, headers, content = 200, {}, json.dumps(tree).encode()
            elif path.startswith(f"/{repo}/resolve/{commit}/") and path.rpartition("/")[2] in files:
                content = files[path.rpartition("/")[2]]
                status, headers = 200, {"X-Repo-Commit": commit, "ETag": f'"{etag(content)}"'}
        if status == 404 and path.startswith(f"/api/models/{repo}/"):
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.files = [], {}
    for (revision, commit), tied in zip(COMMITS.items(), (True, False), strict=True):
        folder = hub.write(tmp_path / revision, hub.tensors(tied=tied), shards=2, tied=tied)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"a pickle, not to be downloaded")
        (folder / "example.png").write_bytes(b"not needed")
        server.files[commit] = {file.name: file.read_bytes() for file in folder.iterdir()}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import sys
from convert import from_hf
from convert.reader import find_checkpoint
from liger_jax import UserError
for repo, revision in [pair.split("@") for pair in sys.argv[1:]]:
    try:
        model = from_hf(repo, revision=revision or None)
        folder = find_checkpoint(repo, revision=revision or None)
        print("tied" if model.lm_head is None else "untied", *sorted(file.name for file in folder.iterdir()))
    except UserError as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""


def load(server, home, *models: str, **environment) -> list[str]:
    """Returns the script's output, one line per model. Runs in a separate process, since HF_ENDPOINT is read at import."""
    host, port = server.server_address
    settings = {
        "HF_ENDPOINT": f"http://{host}:{port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": host,
        "no_proxy": host,
    }
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *models],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **settings, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_downloads_revisions_cache_and_offline(server, tmp_path):
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    main, v1, again, no_revision, no_repo = load(
        server, tmp_path / "home", "acme/tiny@", "acme/tiny@v1", "acme/tiny@", "acme/tiny@v9", "acme/nothing@"
    )
    assert main.split() == again.split() == ["tied", *files]
    assert v1.split() == ["untied", *files]
    failure = "is not a folder, and could not be downloaded from the hub"
    assert no_revision.startswith(f"NotFoundError acme/tiny {failure} at revision 'v9'")
    assert no_repo.startswith(f"NotFoundError acme/nothing {failure}")
    fetched = [line for line in server.requests if line.startswith("GET /acme")]
    # each content is downloaded once: repeated loads and files that both revisions share come from the cache
    assert len(fetched) == len({etag(server.files[commit][file]) for commit in COMMITS.values() for file in files})
    assert not any("pytorch_model" in line or "png" in line for line in server.requests)

    # a cached model loads without contacting the server
    server.requests.clear()
    v1, absent = load(server, tmp_path / "home", "acme/tiny@v1", "acme/nothing@", HF_HUB_OFFLINE="1")
    assert v1.split() == ["untied", *files]
    assert absent.startswith(f"NotFoundError acme/nothing {failure}")
    assert server.requests == []
