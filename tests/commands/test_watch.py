from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from bfpo.commands.watch import make_server
from bfpo.core.errors import ConfigError
from messages import raises
from run_folders import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "bfpo", "train", {"method": "bfpo"}, metrics__jsonl=[{"step": 1}])


@pytest.fixture
def server(run_folder: Path) -> Iterator[ThreadingHTTPServer]:
    with make_server([run_folder], every=0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: ThreadingHTTPServer, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode("utf-8")


def test_serves_the_page_as_the_run_is_now(server: ThreadingHTTPServer, run_folder: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, page = ask(server)
    assert status == 200
    assert "is running" not in page
    record = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    assert "bfpo (train) is running" in ask(server)[1]
    (run_folder / "run.json").unlink()  # such as between two writes: the last page stays
    assert "bfpo (train) is running" in ask(server)[1]


def test_other_hosts_paths_and_methods_are_refused(server: ThreadingHTTPServer) -> None:
    port = server.server_port
    assert ask(server, host=f"localhost:{port}")[0] == 200
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
        status, text = ask(server, host=host)
        assert status == 403
        assert "<html" not in text
    assert ask(server, "/run.json")[0] == 404
    assert ask(server, "/../run.json")[0] == 404
    assert ask(server, method="POST")[0] == 501


def test_a_page_that_refreshes_says_so(run_folder: Path) -> None:
    from bfpo.report.gather import gather
    from bfpo.report.page import render_html

    data = gather([run_folder])
    page = render_html(data, refresh_seconds=7)
    assert '<html lang="en" data-refresh="7">' in page
    assert '<noscript><meta http-equiv="refresh" content="7"></noscript>' in page
    assert 'http-equiv="refresh"' not in render_html(data)


def status_of(run_folder: Path, status: str) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**record, "status": status}))


def test_the_page_of_a_run_that_ends_is_the_last_one(run_folder: Path) -> None:
    status_of(run_folder, "running")
    with make_server([run_folder], every=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert "A run in progress" in ask(server)[1]
        assert thread.is_alive()
        status_of(run_folder, "finished")
        page = ask(server)[1]
        assert '<html lang="en">' in page
        assert "A run that has ended" in page
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_run_that_had_ended_is_served_until_it_is_stopped(server: ThreadingHTTPServer) -> None:
    for _ in range(3):
        status, page = ask(server)
        assert status == 200
        assert '<html lang="en">' in page


def test_a_port_that_is_taken_is_named(server: ThreadingHTTPServer, run_folder: Path) -> None:
    with raises(ConfigError, "--port", mask=rf"\b{server.server_port}\b"):
        make_server([run_folder], port=server.server_port)
