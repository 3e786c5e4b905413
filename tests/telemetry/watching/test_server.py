import json
import threading
import urllib.error
import urllib.request

import pytest

from moesaic.errors import ConfigError
from moesaic.telemetry.watching.run import WatchedRun
from moesaic.telemetry.watching.server import WatchServer
from tests.telemetry.watching.lines import append, line, run_folder


@pytest.fixture
def server(tmp_path):
    folder = run_folder(tmp_path / "a <run>")
    append(folder, line(1))
    with WatchServer(WatchedRun(folder)) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


def get(url: str, host: str | None = None):
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    return urllib.request.urlopen(request, timeout=10)


def test_the_page_and_the_state(server):
    assert server.server_address[0] == "127.0.0.1"
    with get(server.url) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "<title>a &lt;run&gt;</title>" in page
    assert "connect-src 'self'" in policy and "default-src 'none'" in policy
    with get(server.url + "state") as answer:
        state = json.load(answer)
    assert (state["step"], state["run"]["steps"]) == (1, [1])
    with get(f"{server.url}state?version={state['version']}") as answer:
        assert json.load(answer)["run"] is None
    with get(server.url + "state?version=x") as answer:
        assert json.load(answer)["run"] is not None


@pytest.mark.parametrize(("path", "host", "status"), [("", "evil.example:80", 403), ("recipe.json", None, 404)])
def test_others_are_refused(server, path, host, status):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server.url + path, host)
    assert refused.value.code == status
    refused.value.close()


def test_a_taken_port_is_told(server):
    with pytest.raises(ConfigError, match="choose another with --port"):
        WatchServer(server.run, server.server_address[1])
