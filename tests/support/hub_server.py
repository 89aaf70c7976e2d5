"""A Hub for tests: the endpoints that huggingface_hub calls, a second origin as its CDN, misbehaviour on request.

Two origins on one event loop in a thread: the Hub redirects large files to the CDN, under addresses signed with a
number that expires on request. Files are served from disk, so sparse ones of many GB cost nothing. Every request is
recorded.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TOKEN = "hf_OnlyForTheHub"
CHUNK = 256 << 10
XET_CHUNK = 64 << 10
HASHED = 1 << 30  # bytes; the "SHA-256" of a larger file is made up, since reading it would take too long


@dataclass(frozen=True)
class Blob:
    """A file: where its bytes are, and what it is stored as."""

    path: Path
    size: int
    oid: str  # SHA-256 of a large file, git's SHA-1 of a small one
    lfs: bool


@dataclass
class Repo:
    """Its commits, by sha: files by name. `access`: public, private or gated."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "public"
    allowed: bool = True  # does TOKEN give access?
    hidden: bool = False  # made with private=True
    xet: bool = False  # are large files offered through Xet too?
    pulls: list[str] = field(default_factory=list)  # titles of pull requests


@dataclass
class Fault:
    """What goes wrong for requests whose path holds `path`: `kind` is a status, or one of the words `_spoil` knows."""

    kind: str | int
    path: str = ""
    origin: str = "cdn"  # or "hub"
    times: int = 1_000_000
    after: int = 0  # requests served well before
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    origin: str
    method: str
    path: str
    authorization: str | None
    range: str | None


class FakeHub:
    """Start it, add folders as repos, ask it what it saw."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.sent = 0  # bytes of bodies
        self.signature = 1
        self.fresh = 1  # the lowest signature that still counts
        self.uploaded: dict[str, Path] = {}
        self.released = threading.Event()  # ends what the fault "holds" holds
        self.quota: tuple[int, float] | None = None  # requests in a window of seconds; more get a 429
        self.refused = 0
        self.page = 2  # models in one answer of a listing
        self._window = (0.0, 0)  # its end, and the requests in it
        # Made by hand: asyncio switches Nagle's algorithm off, 40 ms a response, where only the protocol is named.
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) for _ in range(2)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        self.url, self.cdn = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in sockets)
        apps = {"hub": Starlette(routes=self._hub_routes()), "cdn": Starlette(routes=self._cdn_routes())}
        self._servers = [
            uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", http="h11"))
            for app in apps.values()
        ]
        self._thread = threading.Thread(target=self._run, args=(sockets,), daemon=True)
        self._thread.start()

    def _run(self, sockets: list[socket.socket]) -> None:
        async def both() -> None:
            await asyncio.gather(*(s.serve([sock]) for s, sock in zip(self._servers, sockets, strict=True)))

        asyncio.run(both())

    def stop(self) -> None:
        """Ends both servers."""
        for server in self._servers:
            server.should_exit = server.force_exit = True
        self._thread.join(10)

    # What tests do

    def add(self, name: str, folder: Path, *, ref: str = "main", **options: Any) -> str:
        """Commits a folder's files to a repo and returns the sha."""
        repo = self.repos.setdefault(name, Repo(**options))
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        return self._commit(repo, ref, {rel: self._blob(rel, p) for rel, p in files.items()})

    def fault(self, kind: str | int, path: str = "", **options: Any) -> Fault:
        """Makes requests go wrong from now on."""
        self.faults.append(Fault(kind, path, **options))
        return self.faults[-1]

    def reset(self) -> None:
        """Behaves again, and forgets what it saw."""
        self.faults, self.seen, self.sent, self.quota, self.refused = [], [], 0, None, 0
        self.released.clear()

    def expire(self) -> None:
        """Signed addresses given out so far no longer count."""
        self.fresh = self.signature + 1

    def _blob(self, name: str, path: Path) -> Blob:
        size = path.stat().st_size
        lfs = name.endswith(".safetensors") or size > 10_000_000
        if not lfs:
            data = path.read_bytes()
            return Blob(path, size, hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), False)
        if size > HASHED:
            return Blob(path, size, hashlib.sha256(f"{path}{size}".encode()).hexdigest(), True)
        return Blob(path, size, hashlib.sha256(path.read_bytes()).hexdigest(), True)

    def _commit(self, repo: Repo, ref: str, files: dict[str, Blob]) -> str:
        sha = hashlib.sha1(repr((sorted(files.items()), len(repo.commits))).encode()).hexdigest()
        repo.commits[sha] = files
        repo.refs[ref] = sha
        return sha

    # The Hub

    def _hub_routes(self) -> list[Route]:
        name = "{org}/{name}"
        return [
            Route("/api/models", self._list),
            Route(f"/api/models/{name}", self._info),
            Route(f"/api/models/{name}/discussions", self._discussions),
            Route(f"/api/models/{name}/revision/{{rev:path}}", self._info),
            Route(f"/api/models/{name}/tree/{{rev}}", self._tree),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._yaml, methods=["POST"]),
            Route(f"/api/models/{name}/preupload/{{rev}}", self._preupload, methods=["POST"]),
            Route(f"/api/models/{name}/commit/{{rev}}", self._receive_commit, methods=["POST"]),
            Route(f"/api/models/{name}/paths-info/{{rev:path}}", self._paths_info, methods=["POST"]),
            Route(f"/api/models/{name}/xet-read-token/{{rev:path}}", self._xet_token),
            Route(f"/api/models/{name}/lfs-files/duplicate", self._duplicate, methods=["POST"]),
            Route(f"/{name}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
            Route(f"/api/resolve-cache/{name}/{{rev}}/{{file:path}}", self._resolve_small, methods=["GET", "HEAD"]),
            Route(f"/{name}/resolve/{{rev}}/{{file:path}}", self._resolve, methods=["GET", "HEAD"]),
        ]

    def _cdn_routes(self) -> list[Route]:
        return [
            Route("/files/{org}/{name}/{rev}/{file:path}", self._cdn_file, methods=["GET", "HEAD"]),
            Route("/upload/{oid}", self._upload, methods=["PUT"]),
            Route("/v1/reconstructions/{oid}", self._xet_reconstruction),
            Route("/xorbs/{oid}", self._xet_xorb),
        ]

    def _note(self, request: Request, origin: str) -> Fault | None:
        headers = request.headers
        path = unquote(request.url.path)
        self.seen.append(Seen(origin, request.method, path, headers.get("authorization"), headers.get("range")))
        if origin == "hub" and self.quota is not None:
            (allowed, seconds), (end, count) = self.quota, self._window
            self._window = (end, count + 1) if time.monotonic() < end else (time.monotonic() + seconds, 1)
            if self._window[1] > allowed:
                self.refused += 1
                after = math.ceil(self._window[0] - time.monotonic())
                return Fault(429, headers={"Retry-After": str(after)})
        for f in self.faults:
            if f.origin == origin and f.path in path and f.times > 0:
                if f.after > 0:
                    f.after -= 1
                    return None
                f.times -= 1
                return f
        return None

    def _found(self, request: Request) -> tuple[Repo, str, dict[str, Blob]] | Response:
        """The repo, sha and files that an address means, or the Hub's refusal."""
        p = request.path_params
        repo = self.repos.get(f"{p['org']}/{p['name']}")
        token = (request.headers.get("authorization") or "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.access == "private" and (token != TOKEN or not repo.allowed)):
            return refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.access == "gated" and "resolve" in request.url.path and (token != TOKEN or not repo.allowed):
            return refuse(403 if token else 401, "GatedRepo", "Access to model is restricted")
        rev = unquote(p.get("rev") or "main")
        sha = repo.refs.get(rev) or next((s for s in repo.commits if s.startswith(rev)), None)
        if sha is None:
            return refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return repo, sha, repo.commits[sha]

    async def _info(self, request: Request) -> Response:
        if fault := self._note(request, "hub"):
            return await self._spoiled(fault)
        found = self._found(request)
        if isinstance(found, Response):
            return found
        _, sha, files = found
        name = "{org}/{name}".format(**request.path_params)
        siblings: list[dict[str, Any]] = [{"rfilename": f} for f in files]
        if request.query_params.get("blobs"):
            for entry in siblings:
                blob = files[entry["rfilename"]]
                entry |= {"size": blob.size, "blobId": blob.oid[:40]}
                if blob.lfs:
                    entry["lfs"] = {"size": blob.size, "sha256": blob.oid, "pointerSize": 135}
        return JSONResponse({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})

    async def _list(self, request: Request) -> Response:
        """The models of an author, page by page."""
        if fault := self._note(request, "hub"):
            return await self._spoiled(fault)
        query = request.query_params
        names = sorted(n for n, r in self.repos.items() if n.split("/")[0] == query["author"] and r.access == "public")
        start = int(query.get("cursor", 0))
        shas = "sha" in query.getlist("expand")
        page = [
            {"id": n} | ({"sha": self.repos[n].refs["main"]} if shas else {}) for n in names[start : start + self.page]
        ]
        more = f"{self.url}/api/models?{urlencode([*query.multi_items(), ('cursor', start + self.page)])}"
        headers = {"Link": f'<{more}>; rel="next"'} if start + self.page < len(names) else {}
        return JSONResponse(page, headers=headers)

    async def _discussions(self, request: Request) -> Response:
        if fault := self._note(request, "hub"):
            return await self._spoiled(fault)
        found = self._found(request)
        if isinstance(found, Response):
            return found
        name = "{org}/{name}".format(**request.path_params)
        common = {"repo": {"name": name, "type": "model"}, "isPullRequest": True, "status": "open"}
        common |= {"author": {"name": "me"}, "createdAt": "2026-01-01T00:00:00.000Z"}
        pulls = [common | {"num": n, "title": title} for n, title in enumerate(found[0].pulls, 1)]
        return JSONResponse({"discussions": pulls[::-1], "count": len(pulls), "start": 0})

    async def _tree(self, request: Request) -> Response:
        if fault := self._note(request, "hub"):
            return await self._spoiled(fault)
        found = self._found(request)
        if isinstance(found, Response):
            return found
        return JSONResponse([describe(path, blob) for path, blob in found[2].items()])

    async def _paths_info(self, request: Request) -> Response:
        if fault := self._note(request, "hub"):
            return await self._spoiled(fault)
        found = self._found(request)
        if isinstance(found, Response):
            return found
        asked = parse_qs((await request.body()).decode())["paths"]
        return JSONResponse([describe(path, found[2][path]) for path in asked if path in found[2]])

    async def _duplicate(self, request: Request) -> Response:
        """Gives another repo what this one has stored."""
        if fault := self._note(request, "hub"):
            return await self._spoiled(fault)
        if no := self._may_write(request):
            return no
        repo, job = self.repos["{org}/{name}".format(**request.path_params)], await request.json()
        stored = {b.oid: b.path for files in repo.commits.values() for b in files.values()}
        assert job["target"]["name"] in self.repos
        failed = [f | {"error": "no such file"} for f in job["files"] if f["sha256"] not in stored]
        self.uploaded |= {f["sha256"]: stored[f["sha256"]] for f in job["files"] if f["sha256"] in stored}
        return JSONResponse({"failed": failed})

    async def _resolve(self, request: Request) -> Response:
        return await self._resolved(request, direct=False)

    async def _resolve_small(self, request: Request) -> Response:
        return await self._resolved(request, direct=True)

    async def _resolved(self, request: Request, *, direct: bool) -> Response:
        fault = self._note(request, "hub")
        if fault and isinstance(fault.kind, int):
            return await self._spoiled(fault)
        found = self._found(request)
        if isinstance(found, Response):
            return found
        _, sha, files = found
        file = request.path_params["file"]
        if file not in files:
            return refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        blob, name = files[file], "{org}/{name}".format(**request.path_params)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if fault and (fault.kind == "loops" or (fault.kind == "loops whole" and not request.headers.get("range"))):
            return Response(status_code=307, headers=headers | {"Location": str(request.url.path)})
        if fault and fault.kind == "commit":
            headers["X-Repo-Commit"] = "f" * 40
        if fault and fault.kind == "elsewhere":
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.oid}"'}
            return Response(status_code=302, headers=headers | {"Location": fault.headers["Location"]})
        if blob.lfs:
            self.signature += 1
            etag = "0" * 64 if fault and fault.kind == "changed" else blob.oid
            if fault and fault.kind == "leaves" and request.method == "HEAD":
                etag = "../../../../stolen"
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{etag}"'}
            if found[0].xet:
                token = f"{self.url}/api/models/{name}/xet-read-token/{sha}"
                headers |= {"X-Xet-Hash": blob.oid, "Link": f'<{token}>; rel="xet-auth"'}
            location = f"{self.cdn}/files/{name}/{sha}/{file}?signature={self.signature}"
            return Response(status_code=302, headers=headers | {"Location": location})
        if not direct:  # as the Hub does for small files, on its own origin
            location = f"/api/resolve-cache/{name}/{sha}/{file}"
            headers |= {"ETag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
            return Response(status_code=307, headers=headers | {"Location": location})
        return await self._serve(request, blob, fault, headers)

    async def _cdn_file(self, request: Request) -> Response:
        fault = self._note(request, "cdn")
        p = request.path_params
        if request.headers.get("authorization"):  # as S3 does: one signature too many
            return Response("Only one auth mechanism allowed", 400)
        if int(request.query_params.get("signature", 0)) < self.fresh:
            return Response("expired", 403)
        blob = self.repos[f"{p['org']}/{p['name']}"].commits[p["rev"]][p["file"]]
        return await self._serve(request, blob, fault, {})

    async def _serve(self, request: Request, blob: Blob, fault: Fault | None, headers: dict[str, str]) -> Response:
        if fault and isinstance(fault.kind, int):
            return await self._spoiled(fault)
        kind = fault.kind if fault else ""
        if kind == "trickles" and request.headers.get("range"):
            kind = ""
        kind = "trickles" if kind == "trickles ranges" and request.headers.get("range") else kind
        if kind == "holds ranges" or (kind == "holds" and not request.headers.get("range")):
            await self._hold()
        if kind in ("slow", "stalls"):  # stalls, but for scans, whose ranges begin a file
            await asyncio.sleep(0.2 if kind == "slow" or request.headers.get("range") else 10)
        begin, end, status = 0, blob.size, 200
        headers = headers | {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        asked = request.headers.get("range")
        if asked and kind != "ignores ranges":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(int(last) + 1, blob.size) if last else blob.size, 206
            shown, total = begin, blob.size
            if kind == "wrong range":
                shown = begin = begin + 1 if end < blob.size else begin
                end = min(end + 1, blob.size)
            if kind == "grown":
                total += 8
            headers["Content-Range"] = f"bytes {shown}-{end - 1}/{total}"
            if kind == "no Content-Range":
                del headers["Content-Range"]
        if kind == "etag":
            headers["ETag"] = f'"{time.monotonic_ns()}"'
        sent = end - begin
        if kind == "short":
            sent -= 1
        if kind == "long":
            sent += 1 << 20
        if kind == "gzip":
            with blob.path.open("rb") as f:
                f.seek(begin)
                return Response(gzip.compress(f.read(sent)), status, headers | {"Content-Encoding": "gzip"})
        headers["Content-Length"] = str(sent)
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        return StreamingResponse(self._bytes(blob, begin, sent, str(kind)), status, headers)

    async def _bytes(self, blob: Blob, begin: int, length: int, kind: str) -> AsyncIterator[bytes]:
        fd = os.open(blob.path, os.O_RDONLY)
        try:
            for at in range(begin, begin + length, 1 if kind == "trickles" else CHUNK):
                if kind == "trickles":
                    yield os.pread(fd, 1, at)
                    await asyncio.sleep(0.05)
                    continue
                part = os.pread(fd, min(CHUNK, begin + length - at), at)
                if kind == "hangs up":
                    self.sent += len(part) // 2
                    yield part[: len(part) // 2]
                    await asyncio.sleep(0.01)
                    raise ConnectionResetError
                part += b"\0" * (min(CHUNK, begin + length - at) - len(part))
                self.sent += len(part)
                yield part
                await asyncio.sleep(0.05 if kind == "slow" else 0)  # where a client that has gone is noticed
        finally:
            os.close(fd)

    # Xet: a file is the chunks of one "xorb", under the file's own SHA-256 in place of Xet's hashes

    async def _xet_token(self, request: Request) -> Response:
        self._note(request, "hub")
        token, ends = "xet-token", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.cdn, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(ends)}
        return JSONResponse({"casUrl": self.cdn, "accessToken": token, "exp": ends}, headers=headers)

    def _xorb(self, oid: str) -> tuple[int, int, bytes]:
        """The length of a file, the number of its chunks, and its chunks."""
        blobs = [b for r in self.repos.values() for c in r.commits.values() for b in c.values() if b.oid == oid]
        data = blobs[-1].path.read_bytes()
        chunks = [data[at : at + XET_CHUNK] for at in range(0, len(data), XET_CHUNK)]
        sizes = [len(chunk).to_bytes(3, "little") for chunk in chunks]
        xorb = b"".join(b"\0" + n + b"\0" + n + chunk for n, chunk in zip(sizes, chunks, strict=True))
        return len(data), len(chunks), xorb

    async def _xet_reconstruction(self, request: Request) -> Response:
        self._note(request, "cdn")
        oid = request.path_params["oid"]
        size, count, xorb = self._xorb(oid)
        begin = int((request.headers.get("range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin >= size:
            return Response(status_code=416)
        chunks = {"start": 0, "end": count}
        found = {"range": chunks, "url": f"{self.cdn}/xorbs/{oid}", "url_range": {"start": 0, "end": len(xorb) - 1}}
        term = {"hash": oid, "unpacked_length": size, "range": chunks}
        return JSONResponse({"offset_into_first_range": begin, "terms": [term], "fetch_info": {oid: [found]}})

    async def _xet_xorb(self, request: Request) -> Response:
        self._note(request, "cdn")
        _, _, xorb = self._xorb(request.path_params["oid"])
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        part = xorb[int(first) : int(last) + 1]
        shown = f"bytes {first}-{int(first) + len(part) - 1}/{len(xorb)}"
        return Response(part, 206, {"Content-Range": shown, "Content-Type": "application/octet-stream"})

    async def _hold(self) -> None:
        """Answers nothing until the test says so."""
        while not self.released.is_set():
            await asyncio.sleep(0.05)

    async def _blanks(self, slowly: bool) -> AsyncIterator[bytes]:
        """A JSON document without end."""
        while True:
            yield b" " if slowly else b" " * CHUNK
            await asyncio.sleep(0.02 if slowly else 0)

    async def _spoiled(self, fault: Fault) -> Response:
        if fault.kind == "holds":
            await self._hold()
            return refuse(503, "", "held until now")
        if fault.kind in ("never ends", "trickles"):
            return StreamingResponse(self._blanks(fault.kind == "trickles"), media_type="application/json")
        if fault.kind == "says":
            return Response(fault.headers["body"], media_type="application/json")
        return refuse(int(fault.kind), "", "as the test asked", dict(fault.headers))

    # Uploads

    def _may_write(self, request: Request) -> Response | None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return refuse(401, "", "Invalid username or password.")
        return None

    async def _create(self, request: Request) -> Response:
        fault = self._note(request, "hub")
        if fault:
            return await self._spoiled(fault)
        if no := self._may_write(request):
            return no
        doc = await request.json()
        name = f"{doc['organization']}/{doc['name']}"
        if name in self.repos:
            return JSONResponse({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.repos[name] = Repo(hidden=doc.get("visibility") == "private" or bool(doc.get("private")))
        self._commit(self.repos[name], "main", {})
        return JSONResponse({"url": f"{self.url}/{name}", "name": name, "id": name})

    async def _yaml(self, request: Request) -> Response:
        self._note(request, "hub")
        text = (await request.json())["content"]
        if text.startswith("---\n") and "\n---\n" not in text:
            return JSONResponse({"errors": [{"message": "front matter does not end"}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        self._note(request, "hub")
        found = self._found(request)
        if isinstance(found, Response):
            return found
        out = []
        for f in (await request.json())["files"]:
            mode = "lfs" if f["path"].endswith(".safetensors") or f["size"] > 10_000_000 else "regular"
            old = found[2].get(f["path"])
            oid = old.oid if old else None
            out.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": out})

    async def _batch(self, request: Request) -> Response:
        fault = self._note(request, "hub")
        if fault and isinstance(fault.kind, int):
            return await self._spoiled(fault)
        if no := self._may_write(request):
            return no
        repo = self.repos["{org}/{name}".format(**request.path_params)]
        stored = {b.oid for files in repo.commits.values() for b in files.values()}
        objects = []
        for o in (await request.json())["objects"]:
            entry = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in stored and o["oid"] not in self.uploaded:
                entry["actions"] = {"upload": {"href": f"{self.cdn}/upload/{o['oid']}"}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _upload(self, request: Request) -> Response:
        fault = self._note(request, "cdn")
        if fault and fault.kind == "holds":
            await self._hold()
        oid = request.path_params["oid"]
        path, digest = self.root / oid, hashlib.sha256()
        with path.open("wb") as f:
            async for chunk in request.stream():
                digest.update(chunk)
                f.write(chunk)
        if fault and isinstance(fault.kind, int):
            return await self._spoiled(fault)
        if digest.hexdigest() != oid:
            return refuse(400, "", "content does not match its SHA-256")
        self.uploaded[oid] = path
        return Response()

    async def _receive_commit(self, request: Request) -> Response:
        fault = self._note(request, "hub")
        if fault:
            return await self._spoiled(fault)
        if no := self._may_write(request):
            return no
        found = self._found(request)
        if isinstance(found, Response):
            return found
        repo, _, files = found
        files, name, title = dict(files), "{org}/{name}".format(**request.path_params), ""
        for line in (await request.body()).splitlines():
            op = json.loads(line)
            value = op["value"]
            if op["key"] == "header":
                title = value["summary"]
            elif op["key"] == "file":
                data = base64.b64decode(value["content"])
                path = self.root / hashlib.sha1(data).hexdigest()
                path.write_bytes(data)
                files[value["path"]] = self._blob(value["path"], path)
            elif op["key"] == "lfsFile":
                known = [b for r in self.repos.values() for c in r.commits.values() for b in c.values()]
                path = self.uploaded.get(value["oid"]) or next(b.path for b in known if b.oid == value["oid"])
                files[value["path"]] = Blob(path, path.stat().st_size, value["oid"], True)
            elif op["key"] == "deletedFile":
                del files[value["path"]]
        pull = request.query_params.get("create_pr") == "1"
        repo.pulls += [title] * pull
        sha = self._commit(repo, f"refs/pr/{len(repo.pulls)}" if pull else "main", files)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}
        if pull:
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/{len(repo.pulls)}"
        return JSONResponse(answer)


def describe(path: str, blob: Blob) -> dict[str, Any]:
    """A file as the Hub lists it."""
    entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid[:40]}
    if blob.lfs:
        entry |= {"lfs": {"size": blob.size, "oid": blob.oid, "pointerSize": 135}, "xetHash": blob.oid}
    return entry


def refuse(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal as the Hub words it."""
    extra = {"X-Error-Code": code} if code else {}
    return JSONResponse({"error": message}, status, dict(headers or {}) | extra | {"X-Error-Message": message})
