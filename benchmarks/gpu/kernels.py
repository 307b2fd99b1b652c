"""Every op beside the authors' way and the best torch ways, at one weight of Llama-3.1-8B."""

from __future__ import annotations

from benchmarks.gpu.session import Session


def beside_torch(session: Session) -> None:
    session.put(what="to come")


def beside_compiled(session: Session) -> None:
    session.put(what="to come")
