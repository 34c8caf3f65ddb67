from __future__ import annotations

import http.server
import threading

import psutil

from edm_deploy_tools.serving.bench.soak import Figures, Soak


def test_a_server_answers_every_request_and_none_stays_in_its_queue(client):
    soak = Soak(client.port, lambda: [psutil.Process()], seed=1, cancelled=0.2, malformed=0.3)
    soak.run(60, connections=4, steps=(1, 3), kill_every=0, notify=print)
    figures = soak.figures
    assert figures.messages == []
    assert not figures.failed(1000)
    assert sum(figures.answers.values()) + sum(figures.malformed.values()) + figures.cancelled == 60
    assert figures.answers[200] > 0
    assert set(figures.answers) <= {200, 429}  # cancelled requests keep their places until the server has seen that their clients are gone
    assert figures.cancelled > 4
    assert figures.malformed[400] > 8


def test_a_server_that_closes_connections_and_accepts_anything_fails():
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if b"steps" in content:
                return  # no answer
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"models": {"tiny": {"requests": 0}}}')

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        soak = Soak(server.server_address[1], list, seed=1, cancelled=0.0, malformed=0.5)
        soak.run(20, connections=2, steps=(1, 3), kill_every=0, notify=print)
        server.shutdown()
    assert soak.figures.lost > 4
    assert soak.figures.wrong > 2
    assert soak.figures.failed(1000)
    assert len(soak.figures.messages) == 10


def test_growth_beyond_what_is_accepted_fails():
    assert Figures(growth_mb={"serve (1)": 21.0}).failed(20)
    assert not Figures(growth_mb={"serve (1)": -3.0, "http (2)": 19.0}).failed(20)
