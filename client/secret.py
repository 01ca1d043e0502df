"""Secrets of a site: files that nobody else can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class SecretError(RuntimeError):
    """A secret that is missing or that others can read. Never holds the secret."""


def read_secret(path: Path) -> bytes:
    """The content of a secret's file.

    Raises:
        SecretError: There is none, or it can be read or written by others than its owner.
    """
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SecretError(f"{path}: others can read it; say chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise SecretError(f"{path}: cannot be read: {error.strerror}") from None


def read_password(path: Path) -> str:
    """A password or token: the file's first line. Raises `SecretError`."""
    if not path.exists():
        raise SecretError(f"{path}: no such file; write the password or token into it, mode 600")
    try:
        lines = read_secret(path).decode().splitlines()
    except UnicodeDecodeError:
        raise SecretError(f"{path}: is not UTF-8 text") from None
    if not lines or not lines[0]:
        raise SecretError(f"{path}: is empty")
    return lines[0]


def write_secret(path: Path, content: bytes) -> None:
    """Write a new secret's file, mode 0600, on disk when this returns. Raises `FileExistsError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
