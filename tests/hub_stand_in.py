"""A stand-in of the Hugging Face hub on 127.0.0.1, for what bringing down a repository asks of it.

Repositories of models and of datasets are not told apart: the one named is given.
"""

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class StandInHub:
    """Repositories that the server offers, and every path that it was asked for."""

    commits: dict[str, dict[str, bytes]]  # commit hash -> file name -> content
    revisions: dict[tuple[str, str], str]  # (repository, branch, tag or commit) -> commit hash
    gated: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)

    def start(self) -> str:
        """Serve in a thread; the address."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Stop answering; the address refuses connections from then on."""
        self._server.shutdown()
        self._server.server_close()

    def asked_files(self) -> set[str]:
        """Names of the files that somebody fetched or asked about."""
        return {path.rsplit("/", 1)[1] for path in self.asked if "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer as the hub does: description, list of files, or a file."""
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        self.hub.asked.append(path)
        if path.startswith("api/"):
            self._answer_api(path.split("/")[2:])
        else:
            repo, _, rest = path.removeprefix("datasets/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            commit = self._commit(repo, revision)
            if commit is not None:
                self._answer_file(commit, name)

    do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)

    def _answer_api(self, parts: list[str]) -> None:
        """Answer owner/name[/revision/REVISION] or owner/name/tree/REVISION[/FOLDER]."""
        repo, kind = "/".join(parts[:2]), "".join(parts[2:3])
        commit = self._commit(repo, "".join(parts[3:4]) or "main")
        if commit is None:
            return
        files = self.hub.commits[commit]
        if kind == "tree":
            self._answer_tree(files, "".join(f"{part}/" for part in parts[4:]))
        else:
            siblings = [{"rfilename": name} for name in files]
            value = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
            self._answer(200, json.dumps(value).encode())

    def _answer_tree(self, files: dict[str, bytes], folder: str) -> None:
        """The files in a folder, and the folders, or all files below it where that is asked."""
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
        below = {name: name.removeprefix(folder) for name in files if name.startswith(folder)}
        if not below:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        listing: list[dict[str, object]] = [
            {"type": "file", "path": name, "size": len(files[name]), "oid": _etag(files[name])}
            for name, inner in below.items()
            if recursive or "/" not in inner
        ]
        folders = {inner.split("/")[0] for inner in below.values() if "/" in inner}
        if not recursive:
            listing += [
                {"type": "directory", "path": f"{folder}{inner}", "size": 0, "oid": ""}
                for inner in sorted(folders)
            ]
        self._answer(200, json.dumps(listing).encode())

    def _answer_file(self, commit: str, name: str) -> None:
        content = self.hub.commits[commit].get(name)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}
        self._answer(200, content, headers)

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; an answer has been sent where there is none."""
        if repo in self.hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not any(known == repo for known, _ in self.hub.revisions):
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif (repo, revision) not in self.hub.revisions:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.revisions[repo, revision]
        return None

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
