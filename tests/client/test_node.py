from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.supernode.register import try_load_public_key

from client.node import NodeBusyError, NodeFolder
from client.secret import SecretError


@pytest.fixture
def node(tmp_path: Path) -> NodeFolder:
    return NodeFolder.create(tmp_path / "node", "Acme Shop")


def pem(node: NodeFolder) -> bytes:
    public = node.private_key().public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_flower_registers_the_public_key_of_the_private_one(node: NodeFolder) -> None:
    assert try_load_public_key(node.public_key) == pem(node)
    assert isinstance(node.private_key().curve, ec.SECP384R1)


def test_the_key_goes_by_the_sites_name(node: NodeFolder) -> None:
    assert node.name == "Acme Shop"
    assert node.public_key.read_text().startswith("ecdsa-sha2-nistp384 ")
    assert node.public_key.read_text().endswith(" Acme Shop\n")


def test_nobody_else_reads_the_key(node: NodeFolder) -> None:
    key = node.path / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(node.path.stat().st_mode) == 0o700
    key.chmod(0o640)
    with pytest.raises(SecretError, match="others can read it"):
        node.private_key()


def test_making_it_again_keeps_the_key_and_makes_what_lacks(node: NodeFolder) -> None:
    before = pem(node)
    public = node.public_key.read_bytes()
    node.public_key.unlink()
    assert pem(NodeFolder.create(node.path, "Acme Shop")) == before
    assert node.public_key.read_bytes() == public


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"])
def test_a_damaged_key_is_named(node: NodeFolder, content: bytes) -> None:
    (node.path / "key").write_bytes(content)
    with pytest.raises(SecretError, match="node/key: no private key of a SuperNode"):
        node.private_key()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    node = NodeFolder(tmp_path / "nowhere")
    with pytest.raises(SecretError, match="nowhere/key: cannot be read"):
        node.private_key()
    with pytest.raises(SecretError, match=r"nowhere/key\.pub"):
        assert node.name


def test_the_number_is_kept(node: NodeFolder) -> None:
    assert node.node_id is None
    node.keep_node_id(2**64 - 1)
    assert node.node_id == 2**64 - 1
    (node.path / "node-id").write_text("garbage")
    assert node.node_id is None


def test_what_the_supernode_said_is_seen(node: NodeFolder) -> None:
    assert node.state is None
    node.say(True, "node 7")
    state = node.state
    assert state is not None
    assert (state.connected, state.text) == (True, "node 7")
    assert abs(state.contact - time.time()) < 5
    node.say_alive()
    later = node.state
    assert later is not None
    assert later.contact > state.contact


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"connected": true}', "[" * 100_000])
def test_a_state_that_cannot_be_read_is_none(node: NodeFolder, content: str) -> None:
    (node.path / "state.json").write_text(content)
    assert node.state is None


def test_one_supernode_at_a_time(node: NodeFolder) -> None:
    with node.held(), pytest.raises(NodeBusyError, match="another SuperNode runs"), node.held():
        pass
    with node.held():
        pass
