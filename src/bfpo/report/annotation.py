"""Labelling answers in a browser on this machine: the answers of runs, the page, and the server that saves labels."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bfpo.core.characters import visible
from bfpo.core.errors import BfpoError, DataError
from bfpo.core.local_server import HOST, LocalServer
from bfpo.core.schema import VerdictRow
from bfpo.judges.annotation import Annotations, Candidate, interval_words
from bfpo.report.models import prompt_text, read_texts, texts_of
from bfpo.report.page import environment, source_hash
from bfpo.report.places import Place, place_of_model
from bfpo.report.read import Run, find_runs
from bfpo.suites.records import SuiteAnswer

__all__ = ["answers_of", "make_server", "render"]

_log = logging.getLogger(__name__)
_LONGEST = 4096  # bytes of a request
_STAGES = ("generate", "evaluate", "redteam")


def answers_of(folders: Sequence[Path]) -> list[Candidate]:
    """Return the answers of runs of generate, evaluate and redteam, with their verdicts; blocked ones are left out.

    What cannot be read of a run, or changed since it was judged, is left out with a warning. Different models that runs
    call by one name are named by their paths. Raises `DataError` for a folder without such a run, or whose answers
    cannot be read, and for different models with one path.
    """
    runs = find_runs(folders)
    tops = [run.path for run in runs if run.stage in ("evaluate", "redteam")]
    outer = [run for run in runs if run.stage in _STAGES and not any(top in run.path.parents for top in tops)]
    found = _told_apart([(run, list(_answers(run))) for run in outer])
    if not found:
        problems = "; ".join(run.problems[0] for run in runs[:1] if run.problems)
        raise DataError(
            f"{', '.join(map(str, folders))}: no run of {', '.join(_STAGES)} with answers in it"
            f"{f' ({problems})' if problems else ''}"
        )
    for problem in dict.fromkeys(problem for run in outer for problem in run.problems):
        _log.warning("%s", problem)
    return found


def _told_apart(found: Sequence[tuple[Run, Sequence[Candidate]]]) -> list[Candidate]:
    """Return the answers of all runs; models that are called alike, but are not in one place, by their paths."""
    places: dict[str, list[tuple[Run, str, Place]]] = {}
    for run, answers in found:
        paths = {one.name: one.model for one in getattr(run.scores, "models", ())}
        for name in dict.fromkeys(one.model for one in answers if one.model):
            path = paths.get(name) or name
            places.setdefault(name, []).append((run, path, place_of_model(path, run)))
    renamed: dict[tuple[Run, str], str] = {}
    for name, rows in places.items():
        first = [next(row for row in rows if row[2].is_same(place)) for _, _, place in rows]
        own = list({id(row): row for row in first}.values())
        for (run, path, _), (other, same, _) in combinations(own, 2):
            if path == same:
                raise DataError(
                    f"{run.path} and {other.path} have answers of two different models, both called {name} ({path}); "
                    "label them in two folders"
                )
        if len(own) > 1:
            _log.warning(
                "%s is the name of %d models; labels name them %s", name, len(own), ", ".join(r[1] for r in own)
            )
            renamed |= {(run, name): row[1] for (run, _, _), row in zip(rows, first, strict=True)}
    return [replace(one, model=renamed.get((run, one.model), one.model)) for run, answers in found for one in answers]


def _answers(run: Run) -> Iterator[Candidate]:
    if rows := run.rows(SuiteAnswer, "answers.jsonl") if run.stage == "evaluate" else []:
        for row in rows:
            if not (row.blocked or row.guarded):  # behind a guard it is another model's answer
                yield Candidate(row.id, row.model, row.suite, row.kind, row.prompt, row.text, row.finished, row.verdict)
        return
    inner = {"generate": "", "redteam": "label/", "evaluate": ""}[run.stage]
    verdicts = {row.completion_id: row for row in run.rows(VerdictRow, f"{inner}verdicts.jsonl")}
    made = {"generate": "completions.jsonl", "redteam": "generate/completions.jsonl"}.get(run.stage)
    texts = texts_of(run) if made is None else read_texts(run, run.path / made)
    source = Path(run.setting("prompts", str) or run.setting("completions", str) or "").stem
    for one in texts.values():
        if not one.blocked:
            verdict = verdicts.get(one.id)
            yield Candidate(one.id, one.model, source, one.kind, one.prompt, one.text, one.finished, verdict)


# ------------------------------------------------------------------------------------------------------- the page


def render(annotations: Annotations, token: str) -> tuple[str, str]:
    """Return the page and its content security policy; of an answer it holds the number, the prompt and the text."""
    made = environment(autoescape=True)
    script, style = (made.loader.get_source(made, f"annotate.{kind}")[0] if made.loader else "" for kind in _PARTS)
    items = [
        {"item": one.item, "prompt": visible(prompt_text(one.prompt)), "text": visible(one.text)}
        for one in annotations.sample.answers
    ]
    state = {"token": token, "items": items, **_state(annotations)}
    # Inside a script element only `<` can end it or open a comment.
    data = Markup(json.dumps(state, ensure_ascii=True).replace("<", "\\u003c"))
    page = made.get_template("annotate.html").render(
        data=data, script=Markup(script), style=Markup(style), annotator=annotations.annotator
    )
    allowed = {kind: f"'{source_hash(text)}'" for kind, text in zip(_PARTS, (script, style), strict=True)}
    policy = (
        f"default-src 'none'; script-src {allowed['js']}; style-src {allowed['css']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


_PARTS = ("js", "css")


def _state(annotations: Annotations) -> dict[str, Any]:
    said = {item: [one.safety, one.behaviour] for item, one in annotations.said.items()}
    return {"said": said, "words": interval_words(annotations.sample, len(said))}


def make_server(annotations: Annotations, *, port: int = 0) -> tuple[LocalServer, str]:
    """Return a server, bound to 127.0.0.1, and its address: the page at `/TOKEN/`, which labels by POST.

    The token is new for each server: other users of the machine and other sites do not know it. Requests with another
    `Host` or `Origin` are refused (403), as a protection against DNS rebinding and cross-site posts; a body must be
    JSON. Stops after a POST to `end`. Raises `ConfigError` for a port that is in use.
    """
    token, lock = secrets.token_urlsafe(24), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = "bfpo", "", 20

        def do_GET(self) -> None:
            """Answer with the page."""
            if self._refused():
                return
            if self.path != f"/{token}/":
                self._answer(HTTPStatus.NOT_FOUND, "open the address that bfpo annotate shows")
                return
            page, policy = render(annotations, token)
            self._answer(HTTPStatus.OK, page, policy=policy)

        def do_POST(self) -> None:
            """Save a label, take one back, or stop."""
            if self._refused():
                return
            sent = self.headers.get("Content-Length") or ""
            known = self.path in {f"/{token}/{name}" for name in ("label", "undo", "end")}
            if not known or not secrets.compare_digest(self.headers.get("X-Token") or "", token):
                self._answer(HTTPStatus.FORBIDDEN, "the token of the page is missing")
            elif self.headers.get_content_type() != "application/json":
                self._answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is needed")
            elif not (sent.isascii() and sent.isdigit()) or int(sent) > _LONGEST:
                self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_LONGEST} bytes")
            else:
                self._post(self.path.rpartition("/")[2], self.rfile.read(int(sent)))

        def _post(self, name: str, body: bytes) -> None:
            try:
                given = json.loads(body)
                with lock:
                    if name == "label":
                        annotations.label(*(str(given.get(key, "")) for key in ("item", "safety", "behaviour")))
                    undone = annotations.undo() if name == "undo" else None
                    annotations.write()
            except (ValueError, AttributeError, RecursionError, OSError, BfpoError) as error:
                self._answer(HTTPStatus.BAD_REQUEST, str(error) if isinstance(error, BfpoError) else "not a label")
                return
            reply = json.dumps({"undone": undone, **_state(annotations)})
            self._answer(HTTPStatus.OK, reply, kind="application/json")
            if name == "end":
                threading.Thread(target=server.shutdown).start()  # it waits for the loop that this thread serves

        def _refused(self) -> bool:
            hosts, origins = self.headers.get_all("Host") or [""], self.headers.get_all("Origin") or []
            if set(hosts) <= server.names and set(origins) <= {f"http://{name}" for name in server.names}:
                return False
            self._answer(HTTPStatus.FORBIDDEN, f"only for this machine: open it as {HOST}")
            return True

        def _answer(self, status: HTTPStatus, text: str, *, kind: str = "text/html", policy: str = "") -> None:
            content = text.encode("utf-8")
            self.send_response(status)
            for name, value in {
                "Content-Type": f"{kind if status == HTTPStatus.OK else 'text/plain'}; charset=utf-8",
                "Content-Length": str(len(content)),
                "Content-Security-Policy": policy or "default-src 'none'",
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Cross-Origin-Resource-Policy": "same-origin",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log requests."""

    server = LocalServer(port, Handler)
    return server, f"http://{HOST}:{server.server_port}/{token}/"
