"""Rewards over HTTP: whatever a server does, nothing is lost and nothing mixed up."""

import contextlib
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import commands
import numpy as np
import pytest

from dreamlite_jax.rewards import opening, protocol, remote, serving
from dreamlite_jax.rewards.base import Example, Requests, Reward, RewardError, scored, self_test

QUICK = remote.Settings(
    batch_size=2, concurrency=3, timeout=0.5, attempts=3, patience=5.0, pause=0.01
)


def identity(images, prompts, sources, metadata):
    """The number that a picture, a prompt and its metadata agree on."""
    numbers = [int(image[0, 0, 0]) for image in images]
    assert numbers == [int(prompt) for prompt in prompts] == [at["number"] for at in metadata]
    assert all(s is None or s[0, 0, 1] == n for s, n in zip(sources, numbers, strict=True))
    return [float(number) for number in numbers]


IDENTITY = Reward("identity", identity, 0.0, 100.0)


def requests_of(numbers):
    images = [np.full((3, 2, 3), n, np.uint8) for n in numbers]
    sources = [None if n % 2 else np.full((2, 4, 3), n, np.uint8) for n in numbers]
    return Requests(images, [str(n) for n in numbers], sources, [{"number": n} for n in numbers])


def started(server):
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def serve():
    made = []

    def start(reward=IDENTITY, port=0):
        made.append(serving.server(reward, port=port))
        return started(made[-1])

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


class Script:
    """A server that answers requests in turn as a list of functions says, and then properly.

    A function gets the request's id and the right scores, and gives a status and the body's parts,
    between which time passes, with the length that is claimed where it is another.
    """

    def __init__(self, *answers):
        self.answers, self.seen, self.lock = list(answers), 0, threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                about = protocol.describe(IDENTITY)
                with contextlib.suppress(ValueError):  # a test's own description
                    about = protocol.with_answered(about, script.seen)
                self.answer(200, [about])

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                name, requests = protocol.read_request(body)
                with script.lock:
                    script.seen += 1
                    given = script.answers.pop(0) if script.answers else proper
                found = given(name, identity(*requests))
                if found is not None:
                    self.answer(*found)

            def answer(self, status, parts, length=None):
                self.send_response(status)
                self.send_header("Content-Length", str(length or sum(map(len, parts))))
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)
                    time.sleep(0.2 * (part is not parts[-1]))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that have gone
        self.url = started(self.server)


def proper(name, scores):
    return 200, [protocol.reply(name, scores)]


@pytest.fixture
def script():
    made = []

    def start(*answers):
        made.append(Script(*answers))
        return made[-1]

    yield start
    for one in made:
        one.server.shutdown()
        one.server.server_close()


# --- Answers --------------------------------------------------------------------------------------


def test_scores_come_back_in_order(serve):
    reward = remote.open_remote(serve(), QUICK)
    assert (reward.name, reward.least, reward.most) == ("identity", 0.0, 100.0)
    numbers = [7, 3, 9, 1, 4, 4, 8]
    assert scored(reward, requests_of(numbers)).tolist() == numbers
    assert scored(reward, requests_of([])).shape == (0,)


def slow(name, scores):
    time.sleep(1.0)  # longer than the client waits
    return proper(name, scores)


def late(name, scores):
    """Batches that come later are answered sooner."""
    time.sleep(0.3 - 0.02 * scores[0])
    return proper(name, scores)


def listing(name, listed):
    return 200, [json.dumps({"id": name, "scores": listed}).encode()]


def out_of_order(name, scores):
    return listing(name, [{"item": k, "score": s} for k, s in enumerate(scores)][::-1])


def of_another(name, scores):
    return 200, [protocol.reply("another", [0.0] * len(scores))]


def short(name, scores):
    return 200, [protocol.reply(name, scores[:-1])]


def twice(name, scores):
    return listing(name, [{"item": 0, "score": 1.0}] * (len(scores) + 1))


def nested(name, scores):
    return listing(name, [{"item": k, "score": [s]} for k, s in enumerate(scores)])


def endless(name, scores):
    return listing(name, [{"item": math.inf, "score": s} for s in scores])


def nan(name, scores):
    return 200, [protocol.reply(name, [math.nan] * len(scores))]


def beyond(name, scores):
    return 200, [protocol.reply(name, [1e6] * len(scores))]


def garbage(name, scores):
    return 200, [b"<html>a proxy says hello</html>"]


def failing(name, scores):
    return 500, [protocol.failure(RuntimeError("out of memory"))]


def overrun(name, scores):
    return 503, [b"later"]


def silent(name, scores):
    """Closes without a word."""


def cut_off(name, scores):
    return 200, proper(name, scores)[1], 10**4


def failing_and_cut_off(name, scores):
    return 500, failing(name, scores)[1], 10**4


def dripping(name, scores):
    """No pause is longer than the client waits, all together are."""
    body = protocol.reply(name, scores)
    return 200, [body[k : k + 5] for k in range(0, len(body), 5)]


@pytest.mark.parametrize(
    "answer",
    [
        *(slow, late, out_of_order, of_another, short, twice, nested, endless, nan, beyond),
        *(garbage, failing, overrun, silent, cut_off, failing_and_cut_off, dripping),
    ],
)
def test_whatever_a_server_does_once_each_picture_has_its_own_score(answer, script):
    made = script(answer, answer)
    numbers = [5, 2, 8, 6, 1]
    found = scored(remote.open_remote(made.url, QUICK), requests_of(numbers))
    assert found.tolist() == numbers
    assert made.seen == 3 + (0 if answer in (late, out_of_order) else 2)


@pytest.mark.parametrize(
    "answer, message",
    [
        (of_another, "answered wrongly 3 times: a reply to another request"),
        (short, "answered wrongly 3 times: scores of items [0] for 2 pictures"),
        (nan, "answered wrongly 3 times: reward identity: 2 of 2 scores are nan"),
        (beyond, "a score of 1e+06 is outside of its range 0 to 100"),
        (garbage, "answered wrongly 3 times"),
        (failing, "status 500: RuntimeError: out of memory"),
        (lambda *_: (400, [protocol.failure(ValueError("no"))]), "status 400: ValueError: no"),
    ],
)
def test_a_server_that_goes_on_answering_wrongly_ends_it(answer, message, script):
    reward = remote.open_remote(script(*[answer] * 9).url, QUICK)
    with pytest.raises(RewardError) as error:
        scored(reward, requests_of([1, 2]))
    assert message in str(error.value) and "\n" not in str(error.value)


# --- Servers that go ------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_dies_and_comes_back(serve):
    port = free_port()
    first = serving.server(IDENTITY, port=port)
    reward = remote.open_remote(started(first), QUICK)
    assert scored(reward, requests_of([1, 2])).tolist() == [1, 2]
    first.shutdown()
    first.server_close()
    later = threading.Timer(0.6, serve, kwargs={"port": port})
    later.start()
    began = time.monotonic()
    assert scored(reward, requests_of([9, 4, 6])).tolist() == [9, 4, 6]
    assert time.monotonic() - began > 0.5
    later.join()


def gone():
    server = serving.server(IDENTITY)
    url = started(server)
    return server, url


class Clock:
    """In place of `time`: nothing but sleep takes any, however slow the machine."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    return clock


@pytest.mark.parametrize("patience", [0.0, 0.4])
def test_a_server_that_stays_away_is_an_error_in_time(patience, clock):
    server, url = gone()
    reward = remote.open_remote(url, QUICK._replace(patience=patience))
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=r"has been away for .*; start it, then run the same"):
        scored(reward, requests_of([1, 2, 3]))
    assert patience <= clock.now < patience + 2


def test_waiting_ends_when_the_run_is_asked_to_leave(clock):
    server, url = gone()
    settings = QUICK._replace(patience=60, pause=30.0)
    reward = remote.open_remote(url, settings, lambda: clock.now > 0.3)
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match="asked to leave while its server was away"):
        scored(reward, requests_of([1]))
    assert 0.3 < clock.now < 5


@pytest.mark.parametrize(
    "body, message",
    [
        (None, "start the server first"),
        (b"{}", "it does not describe a reward: 'range'"),
        (b"hello", "it does not describe a reward"),
        (b'{"name": "x", "range": [0, 1], "tasks": ["draw"], "needs": []}', "known are"),
    ],
)
def test_what_is_no_reward_server_is_found_at_once(body, message, script, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}"
    if body is not None:
        url = script().url
        monkeypatch.setattr(protocol, "describe", lambda _: body)
    with pytest.raises(RewardError) as error:
        opening.open_rewards([{"reward": url}])
    assert message in str(error.value) and url in str(error.value)


# --- The server -----------------------------------------------------------------------------------


def test_a_hosted_reward_is_the_reward(serve):
    """The judge behind HTTP passes the self-test, and says what it says here."""
    entry = {"reward": serve(opening.BUILT_IN["shapes"]), "name": "far", "batch_size": 3}
    ((reward, _, tasks),) = opening.open_rewards([entry])
    assert (reward.name, tasks) == ("far", ("t2i", "edit"))
    self_test(reward)
    examples = opening.BUILT_IN["shapes"].examples()
    images = [e.good for e in examples] + [e.bad for e in examples]
    pairs = [[e[k] for e in examples] * 2 for k in (2, 3, 4)]
    given = Requests(images, *pairs)
    np.testing.assert_array_equal(scored(reward, given), scored(opening.BUILT_IN["shapes"], given))


@pytest.mark.parametrize("name", ["saturation", "sharpness"])
def test_a_hosted_reward_is_tested_with_its_own_examples(name, serve):
    """Here with noise, which has much of both, it would fail."""
    ((reward, *_),) = opening.open_rewards([{"reward": serve(opening.BUILT_IN[name])}])
    self_test(reward)


def test_examples_bring_what_a_reward_needs_to_know(serve):
    """A bright picture is good where metadata asks for light, a dark one elsewhere."""
    light, dark = (np.full((4, 5, 3), value, np.uint8) for value in (200, 20))

    def brightness(images, prompts, sources, metadata):
        signs = [1 if at["light"] else -1 for at in metadata]
        return [s * float(image.mean()) for s, image in zip(signs, images, strict=True)]

    shown = [
        Example(light, dark, "by day", None, {"light": True}),
        Example(dark, light, "by night", light, {"light": False}),
    ]
    reward = Reward("brightness", brightness, examples=lambda: shown)
    self_test(remote.open_remote(serve(reward), QUICK))
    turned = reward._replace(score=lambda *given: [-x for x in brightness(*given)])
    with pytest.raises(RewardError, match="for 'by day' a good picture scores -200, a bad one -20"):
        self_test(remote.open_remote(serve(turned), QUICK))


def test_a_function_alone_has_to_know_shapes_from_noise(serve):
    def flat(images, prompts, sources, metadata):
        return [-float(np.abs(np.diff(image.astype(float), axis=1)).mean()) for image in images]

    self_test(remote.open_remote(serve(Reward("flat", flat)), QUICK))
    noisy = Reward("noisy", lambda *given: [-x for x in flat(*given)])
    with pytest.raises(RewardError, match="a good picture scores"):
        self_test(remote.open_remote(serve(noisy), QUICK))


def test_a_reward_that_fails_leaves_the_server_up(serve):
    def fussy(images, prompts, sources, metadata):
        if "bad" in prompts:
            raise RuntimeError("no such prompt")
        return [1.0] * len(images)

    reward = remote.open_remote(serve(Reward("fussy", fussy)), QUICK)
    image = [np.zeros((2, 2, 3), np.uint8)]
    with pytest.raises(RewardError, match="RuntimeError: no such prompt"):
        scored(reward, Requests(image, ["bad"], [None], [{}]))
    assert scored(reward, Requests(image, ["good"], [None], [{}])).tolist() == [1.0]


@pytest.mark.parametrize(
    "body, message",
    [
        (b"x", "JSONDecodeError"),
        (b"[]", "no request"),
        (b'{"id": "a"}', "no request: KeyError 'items'"),
        (b'{"id": "a", "items": [{"prompt": "p", "image": "AAAA"}]}', "not a PNG"),
    ],
)
def test_requests_that_are_none(body, message, serve):
    with pytest.raises(RewardError) as error:
        remote._fetched(remote.urllib.request.Request(serve(), body), 2.0)
    assert "status 400" in str(error.value) and message in str(error.value)


def test_pictures_travel_to_the_bit():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(protocol.unpacked(protocol.packed(image)), image)


@pytest.mark.parametrize(
    "name, message",
    [
        ("beauty", "known are hpsv3, editreward, shapes"),
        ("no_module:x", "No module named 'no_module'"),
        ("math:nothing", "has no attribute 'nothing'"),
        ("math:pi", "neither a function nor a Reward"),
        ("hpsv3", "No module named 'hpsv3'"),
        ("editreward", "No module named 'EditReward'"),
    ],
)
def test_rewards_that_cannot_be_served(name, message, capsys):
    assert commands.run("serve_reward", f"--reward={name}") == 2
    assert message in capsys.readouterr().err
