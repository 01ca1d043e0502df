"""Against a hub that does what it likes. `test_supernode.py` has a real one."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)

from client import fleet
from client.fleet import Asked, Fleet, HubError, MessageError, RunOverError, StoppedError
from protocol.exchange import Parts
from protocol.records import to_records
from server.certificates import create_authority, issue_server

Answer = tuple[int, bytes]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A peer that hangs up is none."""


class FakeHub:
    """Answers each call as it is told to."""

    def __init__(self, certificates: Path, host: str = "127.0.0.1") -> None:
        self.says: dict[str, Callable[[bytes], Answer]] = {}
        """By the last part of the path."""
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = self.rfile.read(int(self.headers["content-length"]))
                hub.asked.append(self.path)
                assert self.headers["accept-encoding"] == "identity"
                status, body = hub.says[self.path.rpartition("/")[2]](request)
                self.send_response_only(status)
                for name, value in {"date": self.date_time_string(), **hub.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = _Server((host, 0), Handler)
        self.server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.address = f"localhost:{self.server.server_address[1]}"

    def say(self, call: str, message: Any = None, status: int = 200) -> None:
        body = b"" if message is None else message.SerializeToString()
        self.says[call] = lambda _: (status, body)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    create_authority(folder, "test", int(time.time()))
    issue_server(folder, ["localhost"], int(time.time()))
    return folder


@pytest.fixture
def hub(certificates: Path) -> Iterator[FakeHub]:
    with serving(FakeHub(certificates)) as hub:
        yield hub


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


KEY = ec.generate_private_key(ec.SECP384R1())


@pytest.fixture
def stopped() -> threading.Event:
    return threading.Event()


def connect(address: str, certificates: Path, stopped: threading.Event) -> Fleet:
    authority = (certificates / "ca.crt").read_bytes()
    return Fleet(address, authority, KEY, "acme", stopped)


@pytest.fixture
def site(
    hub: FakeHub, certificates: Path, stopped: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    # What fails once is an error at once.
    monkeypatch.setattr(fleet, "PATIENCE_S", 0.0)
    hub.say("activate-node", ActivateNodeResponse(node_id=7))
    hub.say("confirm-message-received", ConfirmMessageReceivedResponse())
    site = connect(hub.address, certificates, stopped)
    assert site.activate(None) == 7
    yield site
    site.close()


def message(content: RecordDict, ttl: float = 60.0) -> Message:
    metadata = Metadata(
        run_id=3,
        message_id="",
        src_node_id=1,
        dst_node_id=7,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=ttl,
        message_type="train",
    )
    made = make_message(metadata, content)
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def offer(hub: FakeHub, content: RecordDict, **other: bytes) -> dict[str, bytes]:
    """Have the hub hold a message; returns its objects."""
    sent = message(content)
    objects = {id_: one.deflate() for id_, one in get_all_nested_objects(sent).items()}
    told = message_to_proto(remove_content_from_message(sent))
    tree = get_object_tree(sent)
    hub.say(
        "pull-messages", PullMessagesResponse(messages_list=[told], message_object_trees=[tree])
    )
    hold(hub, objects)
    return objects


def hold(hub: FakeHub, objects: dict[str, bytes]) -> None:
    def pull(request: bytes) -> Answer:
        content = objects.get(PullObjectRequest.FromString(request).object_id)
        response = PullObjectResponse(
            object_found=content is not None,
            object_available=bool(content),
            object_content=content or b"",
        )
        return 200, response.SerializeToString()

    hub.says["pull-object"] = pull


def receive(site: Fleet) -> Asked:
    asked = site.receive()
    assert asked is not None
    return asked


PARTS = Parts({"train": '{"round": 1}'}, bytes(range(256)) * 1000)


# ------------------------------------------------------------------------ what goes well


def test_a_message_comes_and_its_answer_goes(hub: FakeHub, site: Fleet) -> None:
    offer(hub, to_records(PARTS))
    asked = receive(site)
    assert 50 < asked.seconds_left <= 60
    assert site.fetch(asked) == PARTS

    pushed: dict[str, bytes] = {}
    replies: list[Any] = []

    def push_message(request: bytes) -> Answer:
        read = PushMessagesRequest.FromString(request)
        [reply], [tree] = read.messages_list, read.message_object_trees
        replies.append(reply)
        ids = [tree.object_id, *(child.object_id for child in tree.children)]
        response = PushMessagesResponse(objects_to_push=ids, session_id="s")
        return 200, response.SerializeToString()

    def push_object(request: bytes) -> Answer:
        read = PushObjectRequest.FromString(request)
        assert (read.session_id, read.run_id) == ("s", 3)
        pushed[read.object_id] = read.object_content
        return 200, PushObjectResponse(stored=True).SerializeToString()

    hub.says.update({"push-messages": push_message, "push-object": push_object})
    site.answer(asked, Parts({"train": "done"}, None), 1.5)
    [reply] = replies
    assert reply.metadata.reply_to_message_id == asked.message.metadata.message_id
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (7, 1)
    assert len(pushed) == 2
    assert all(get_object_id(content) == id_ for id_, content in pushed.items())

    site.answer(asked, "no such agent", 0.1)
    assert replies[1].error.reason == "no such agent"
    calls = {path.rpartition("/")[2] for path in hub.asked}
    assert not calls & {"get-run", "get-fab", "register-node"}


def test_no_message_is_none(hub: FakeHub, site: Fleet) -> None:
    hub.say("pull-messages", PullMessagesResponse())
    assert site.receive() is None


def test_objects_that_are_still_on_their_way_are_waited_for(
    hub: FakeHub, site: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE_S", 20.0)
    objects = offer(hub, to_records(PARTS))
    there = dict(objects)
    late = max(objects, key=lambda id_: len(objects[id_]))
    there[late] = b""
    hold(hub, there)
    timer = threading.Timer(0.3, lambda: there.update(objects))
    timer.start()
    assert site.fetch(receive(site)) == PARTS
    timer.join()


def test_a_hub_that_is_starting_is_asked_again(
    hub: FakeHub, site: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE_S", 20.0)
    statuses = iter([503, 429, 200])
    hub.says["pull-messages"] = lambda _: (next(statuses), b"")
    assert site.receive() is None
    assert next(statuses, None) is None


def test_an_earlier_life_is_ended_first(hub: FakeHub, site: Fleet) -> None:
    for status in (200, 412, 401):
        hub.asked.clear()
        hub.say("deactivate-node", status=status)
        assert site.activate(5) == 7
        assert [path.rpartition("/")[2] for path in hub.asked] == [
            "deactivate-node",
            "activate-node",
        ]


# ------------------------------------------------------------------------ hostile messages


def test_a_message_of_too_many_objects_is_not_loaded(hub: FakeHub, site: Fleet) -> None:
    offer(hub, to_records(PARTS))
    response = PullMessagesResponse.FromString(hub.says["pull-messages"](b"")[1])
    response.message_object_trees[0].children.extend(
        ObjectTree(object_id=str(number)) for number in range(fleet.MOST_OBJECTS)
    )
    hub.say("pull-messages", response)
    with pytest.raises(MessageError, match="more than 1,000 objects"):
        site.fetch(receive(site))
    assert not any(path.endswith("pull-object") for path in hub.asked)


def test_a_message_that_is_too_large_is_loaded_no_further(
    hub: FakeHub, site: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LARGEST_MESSAGE", 100_000)
    offer(hub, to_records(PARTS))
    with pytest.raises(MessageError, match="more than 100,000 bytes"):
        site.fetch(receive(site))


def test_an_array_cannot_name_a_chunk_a_million_times(
    hub: FakeHub, site: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deflate(self: Array) -> bytes:
        said = {"dtype": "", "shape": [], "stype": "safetensors"}
        body = json.dumps({**said, "arraychunk_ids": [0] * 1_000_000}).encode()
        [chunk] = self.children or {}
        return f"Array {chunk} {len(body)}".encode() + b"\x00" + body

    with monkeypatch.context() as patch:
        patch.setattr(Array, "deflate", deflate)
        objects = offer(hub, to_records(Parts({"train": "{}"}, b"x" * 1_000)))
    assert sum(map(len, objects.values())) < fleet.LARGEST_TEXT
    with pytest.raises(MessageError, match=r"more than 67,108,864 bytes"):
        site.fetch(receive(site))


def test_text_is_bounded_apart(hub: FakeHub, site: Fleet) -> None:
    offer(hub, to_records(Parts({"train": "x" * fleet.LARGEST_TEXT}, None)))
    with pytest.raises(MessageError, match="besides its model"):
        site.fetch(receive(site))


def test_an_object_is_what_its_name_says(hub: FakeHub, site: Fleet) -> None:
    objects = offer(hub, to_records(PARTS))
    hold(hub, {id_: content + b" " for id_, content in objects.items()})
    with pytest.raises(MessageError, match="not what its name says"):
        site.fetch(receive(site))


@pytest.mark.parametrize("content", [b"", b"\x00", b"Array  3\x00abc", b"Nothing  0\x00"])
def test_objects_that_are_none_are_refused(hub: FakeHub, site: Fleet, content: bytes) -> None:
    root = get_object_id(content)
    told = message_to_proto(message(RecordDict()))
    told.metadata.message_id = root
    tree = ObjectTree(object_id=root)
    hub.say(
        "pull-messages", PullMessagesResponse(messages_list=[told], message_object_trees=[tree])
    )
    hold(hub, {root: content})
    with pytest.raises(MessageError, match=r"cannot be read|never came whole"):
        site.fetch(receive(site))


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        (RecordDict({"text": ConfigRecord({"train": 3})}), "train: no text"),
        (
            RecordDict({"weights": ArrayRecord({"w": Array("", (), "numpy.ndarray", b"x")})}),
            "weights: not in the format of safetensors",
        ),
    ],
)
def test_records_that_are_not_ours_are_refused(
    hub: FakeHub, site: Fleet, records: RecordDict, fault: str
) -> None:
    offer(hub, records)
    with pytest.raises(MessageError, match=fault):
        site.fetch(receive(site))


def test_what_is_not_there_is_not_waited_for(hub: FakeHub, site: Fleet) -> None:
    offer(hub, to_records(PARTS))
    hold(hub, {})
    with pytest.raises(MessageError, match="never came whole"):
        site.fetch(receive(site))


def test_only_the_answer_is_pushed(hub: FakeHub, site: Fleet) -> None:
    offer(hub, to_records(PARTS))
    hub.say("push-messages", PushMessagesResponse(objects_to_push=["0" * 64], session_id="s"))
    with pytest.raises(HubError, match="no part of the answer"):
        site.answer(receive(site), "no", 0.1)
    hub.say("push-messages", PushMessagesResponse(objects_to_push=[], session_id="s"))
    site.answer(receive(site), "no", 0.1)


def test_a_hub_that_stores_nothing_is_not_handed_an_answer_for_ever(
    hub: FakeHub, site: Fleet
) -> None:
    offer(hub, to_records(PARTS))

    def push_message(request: bytes) -> Answer:
        [tree] = PushMessagesRequest.FromString(request).message_object_trees
        response = PushMessagesResponse(objects_to_push=[tree.object_id], session_id="s")
        return 200, response.SerializeToString()

    hub.says["push-messages"] = push_message
    hub.say("push-object", PushObjectResponse(stored=False))
    with pytest.raises(MessageError, match="too long to take the answer"):
        site.answer(receive(site), "no", 0.1)


def test_a_run_that_is_over_is_told_apart(hub: FakeHub, site: Fleet) -> None:
    offer(hub, to_records(PARTS))
    asked = receive(site)
    hub.say("pull-object", status=403)
    hub.say("push-messages", status=403)
    with pytest.raises(RunOverError):
        site.fetch(asked)
    with pytest.raises(RunOverError):
        site.answer(asked, "no", 0.1)
    hub.say("push-messages", status=413)
    with pytest.raises(MessageError, match="413 Request Entity Too Large"):
        site.answer(asked, "no", 0.1)


# ------------------------------------------------------------------------ hubs that cannot be used


def fails(call: Callable[[], Any], code: int, *said: str) -> None:
    with pytest.raises(HubError) as caught:
        call()
    assert caught.value.code == code
    for text in said:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_not_admitted_says_what_to_do(hub: FakeHub, site: Fleet) -> None:
    said = ("key is not registered", "give acme.pub to the coordinator")
    hub.say("activate-node", status=412)
    fails(lambda: site.activate(None), fleet.NOT_ADMITTED, *said)
    hub.say("pull-messages", status=401)
    fails(site.receive, fleet.NOT_ADMITTED, *said)
    hub.say("send-node-heartbeat", SendNodeHeartbeatResponse(success=False))
    fails(site.beat, fleet.NOT_ADMITTED, *said)


@pytest.mark.parametrize(
    ("ahead", "said"), [(100, "100 s ahead of the hub's"), (-400, "400 s behind the hub's")]
)
def test_a_wrong_clock_is_named(
    hub: FakeHub, site: Fleet, caplog: pytest.LogCaptureFixture, ahead: int, said: str
) -> None:
    hub.say("pull-messages", PullMessagesResponse())
    hub.headers["date"] = time.strftime(
        "%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - ahead)
    )
    site.receive()
    site.receive()
    assert [record.getMessage() for record in caplog.records].count(caplog.messages[0]) == 1
    assert "this machine's clock is" in caplog.messages[0]
    hub.say("pull-messages", status=401)
    # To the second.
    fails(site.receive, fleet.CLOCK, "this machine's clock is", said.split(" ", 2)[2])


def test_a_hub_without_a_clock_is_taken_for_right(hub: FakeHub, site: Fleet) -> None:
    hub.headers["date"] = "tomorrow"
    hub.say("pull-messages", status=401)
    fails(site.receive, fleet.NOT_ADMITTED)


def test_another_version_of_flower_is_named(hub: FakeHub, site: Fleet) -> None:
    said = {"code": int(ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE), "detail": "1.42 is not 1.43"}
    hub.says["pull-messages"] = lambda _: (412, json.dumps(said).encode())
    fails(site.receive, fleet.VERSION, "1.42 is not 1.43")


@pytest.mark.parametrize("status", [302, 400, 404, 418])
def test_what_is_no_hub_is_named(hub: FakeHub, site: Fleet, status: int) -> None:
    hub.headers["location"] = f"https://{hub.address}/v1/fleet/elsewhere"
    hub.say("pull-messages", status=status)
    fails(site.receive, fleet.STRANGE, f"answered {status}")
    assert not hub.asked[-1].endswith("elsewhere")


def test_an_answer_that_is_none_is_named(hub: FakeHub, site: Fleet) -> None:
    hub.says["pull-messages"] = lambda _: (200, b"<html>welcome</html>")
    fails(site.receive, fleet.STRANGE, "is no hub; check --superlink")


def test_an_answer_without_end_is_not_read(
    hub: FakeHub, site: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_LARGEST_BODY", 100_000)
    # A field that Flower does not know, and would pass over.
    body = b"\x9a\x06\xc0\x84\x3d" + bytes(1_000_000)
    assert PullMessagesResponse.FromString(body)
    hub.says["pull-messages"] = lambda _: (200, body)
    fails(site.receive, fleet.STRANGE)


def test_an_answer_that_takes_too_long_is_not_waited_for(
    hub: FakeHub, site: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_LONGEST_CALL_S", -1.0)
    hub.says["pull-messages"] = lambda _: (200, bytes(10))
    fails(site.receive, fleet.UNREACHABLE, "does not answer: no answer in time")


def test_a_hub_that_fails_is_not_asked_for_ever(hub: FakeHub, site: Fleet) -> None:
    hub.say("pull-messages", status=500)
    fails(site.receive, fleet.UNREACHABLE, hub.address, "it answers 500")


def test_nobody_there(
    certificates: Path, stopped: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "FIRST_PATIENCE_S", 0.5)
    site = connect("localhost:1", certificates, stopped)
    fails(lambda: site.activate(3), fleet.UNREACHABLE, "localhost:1", "Connection refused")
    site.deactivate()
    site.close()


def test_another_authority_is_not_trusted(
    hub: FakeHub, tmp_path: Path, stopped: threading.Event
) -> None:
    create_authority(tmp_path, "another", int(time.time()))
    site = connect(hub.address, tmp_path, stopped)
    fails(lambda: site.activate(None), fleet.UNTRUSTED, "check --superlink and --root-certificates")
    site.close()
    assert hub.asked == []


def test_another_name_is_not_trusted(certificates: Path, stopped: threading.Event) -> None:
    with serving(FakeHub(certificates, "127.0.0.2")) as hub:
        port = hub.address.partition(":")[2]
        site = connect(f"127.0.0.2:{port}", certificates, stopped)
        fails(lambda: site.activate(None), fleet.UNTRUSTED, "IP address mismatch")
        site.close()
        assert hub.asked == []


def test_no_certificate_at_all(stopped: threading.Event) -> None:
    for content in (b"", b"nothing", "kein Zertifikat für".encode()):
        fails(
            lambda content=content: Fleet("localhost:1", content, KEY, "acme", stopped),  # type: ignore[misc]
            fleet.UNTRUSTED,
            "holds no certificate",
        )


def test_a_port_without_tls(certificates: Path, stopped: threading.Event) -> None:
    class Plain(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site = connect(f"localhost:{server.server_address[1]}", certificates, stopped)
    fails(lambda: site.activate(None), fleet.STRANGE, "speaks no TLS")
    site.close()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_call_ends_soon_once_stopped(
    hub: FakeHub, site: Fleet, stopped: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE_S", 60.0)
    hub.say("pull-messages", status=503)
    timer = threading.Timer(0.3, stopped.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        site.receive()
    assert time.monotonic() - began < 5
    timer.join()
