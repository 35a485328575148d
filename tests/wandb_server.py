"""A wandb server for tests: says yes to what `wandb sync` and wandb-workspaces ask, and keeps what it was sent."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "me"
KEY = "0123456789" * 4


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, dict[str, Any]] = {}
        """What the first message about a run said, by its id."""
        self.history: dict[str, dict[int, str]] = {}
        """Lines by their offset: what is sent twice does not count twice."""
        self.finished: list[str] = []
        self.files: dict[str, set[str]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.refuse: set[str] = set()
        """Ids of runs and titles of reports that it answers with an error."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of ours."""

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            if given["name"] in self.refuse:
                raise PermissionError("no room for it")
            if given["groupName"] is not None:
                self.runs[given["name"]] = given
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}}
            bucket = {"id": given["name"], "name": given["name"], "displayName": given["displayName"]}
            bucket |= {"description": "", "config": "{}", "sweepName": None, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            self.files.setdefault(given["run"], set()).update(given["files"])
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            self.artifacts.append(given["input"])
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
            return {"createArtifact": {"__typename": "CreateArtifactPayload", "artifact": artifact}}
        if "upsertView" in query:
            if given["displayName"] in self.refuse:
                raise PermissionError("no room for it")
            self.views.append(given)
            name = given.get("id") or f"view{len(self.views)}"
            view = {"id": name, "name": given["name"], "displayName": given["displayName"], "type": given["type"]}
            view |= {"description": "", "spec": given["spec"], "updatedAt": "2026-01-01T00:00:00Z"}
            view["project"] = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
            return {"upsertView": {"view": view, "inserted": not given.get("id")}}
        if "GetProjects" in query:
            return {"models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": []}}
        if "upsertModel" in query:
            project = {
                "id": "p",
                "name": given["input"]["name"],
                "entityName": ENTITY,
                "createdAt": "2026-01-01T00:00:00Z",
            }
            project |= {"__typename": "Project", "isBenchmark": False, "user": None}
            return {"upsertModel": {"model": project, "project": project, "inserted": True}}
        user = {"id": "u", "name": ENTITY, "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": user, "serverInfo": {"features": [], "cliVersionInfo": {}}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            given = asked.get("variables") or {}
            try:
                self._reply({"data": self.server.answer(asked["query"], given)})
            except (KeyError, PermissionError) as error:  # A client tries a 5xx again for long.
                self._reply({"errors": [{"message": str(error)}]}, 400)
        elif self.path.endswith("/file_stream"):
            run, said = self.path.split("/")[-2], json.loads(body)
            lines = said.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.server.history.setdefault(run, {}).update(enumerate(lines["content"], start=lines["offset"]))
            if said.get("complete"):
                self.server.finished.append(run)
            self._reply({"exitcode": None, "limits": {}})
        else:
            self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
