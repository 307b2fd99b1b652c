"""Identify the content behind a model's name, so that two models are not confused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from gradpruner.errors import InvalidArgument
from gradpruner.model.load import located, refusing

PACKAGES = ("gradpruner", "torch", "transformers", "tokenizers", "peft", "accelerate")  # they change numbers
READER = "gguf"  # it dequantises GGUF files
# files of a model folder that `load_model` never reads
IGNORED = (".md", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".ot", ".gguf", ".png", ".svg", ".html")
CODE = ".py"  # read only with trust_remote_code
# files beside a GGUF file that transformers reads too, by the beginning of their names
BESIDE_GGUF = ("config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab")
TEMPLATES = "additional_chat_templates"
COMMIT, CODE_OF = "commit", "code of "
CHUNK = 1 << 22  # bytes that are read at a time
LARGE = 2 << 30  # bytes, above which hashing takes seconds and is announced


@dataclass(frozen=True)
class Identity:
    """What a source is made of at one moment, and the versions of the packages that read it.

    Args:
        source: what `load_model` takes.
        content: the SHA-256 of every file that decides what is loaded, by name. For a hub id, the commit.
        versions: the version of each package that changes numbers, by name.
        stamps: size, time of change and inode of every file when it was hashed.
    """

    source: str
    content: Mapping[str, str]
    versions: Mapping[str, str]
    stamps: Mapping[Path, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def revision(self) -> str | None:
        """The commit that must be loaded, or None for files on this machine."""
        return self.content.get(COMMIT)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON keeps: content and versions."""
        return {"content": dict(self.content), "versions": dict(self.versions)}

    def check_unchanged(self) -> None:
        """Raise InvalidArgument if a file was replaced since it was hashed.

        Only files whose size, time or inode changed are read again.
        """
        for path, stamp in self.stamps.items():
            name = str(path.relative_to(_folder(self.stamps)))
            if not path.is_file() or (_stamp(path) != stamp and sha256_of(path) != self.content[name]):
                raise InvalidArgument(
                    f"source {self.source!r}: {name} was replaced while it was in use; expected the same model in all "
                    "stages. Put it back, or start again in another folder"
                )


def identify(
    source: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    known: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Identity:
    """Identify the content that `source` has now.

    Files are read from beginning to end, at 1 to 2 GiB per second.

    Args:
        source: what `load_model` takes.
        trust_remote_code: whether code that comes with the model counts.
        known: an earlier `Identity.to_dict()` of the same hub id. Its commit is kept, even if the hub has a newer one.
        say: is called with a line of text if the hub has a newer commit, and before more than 2 GiB are read.

    Raises:
        InvalidArgument: there is no such model, the known commit is not available, or the source is adapters.
    """
    path, name = located(source), str(source)
    versions = {package: _version(package) for package in PACKAGES}
    if path is None:
        commit = _commit_to_use(name, (known or {}).get("content", {}).get(COMMIT), say)
        elsewhere = _code_elsewhere(_hub_configs(name, commit), trust_remote_code)
        return Identity(name, {COMMIT: commit, **elsewhere}, versions)
    if path.is_dir():
        files = _files_of(path, trust_remote_code)
        if path / "adapter_config.json" in files:
            raise InvalidArgument(
                f"source {name!r} is adapters on another model; expected a plain model: merge them first "
                "(PeftModel.merge_and_unload)"
            )
        elsewhere = _code_elsewhere([path / "config.json", path / "tokenizer_config.json"], trust_remote_code)
    else:
        files, elsewhere = [path, *(f for f in _files_of(path.parent, False) if f.name.startswith(BESIDE_GGUF))], {}
        versions[READER] = _version(READER)
    size = sum(file.stat().st_size for file in files)
    if size > LARGE:
        say(f"model: reading {size / 2**30:.1f} GiB of {name} to identify its content")
    stamps = {file: _stamp(file) for file in files}
    folder = _folder(stamps)
    content = {str(file.relative_to(folder)): sha256_of(file) for file in files}
    return Identity(name, {**content, **elsewhere}, versions, stamps)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between two identities.

    The names are worded to follow the words "made from another".

    Args:
        before: the `Identity.to_dict()` of earlier.
        now: the `Identity.to_dict()` of now.
    """
    names = []
    for kind, what in (("content", "content of "), ("versions", "version of ")):
        old, new = before.get(kind, {}), now[kind]
        for name in sorted(old.keys() | new.keys()):
            was, is_now = old.get(name, "none"), new.get(name, "none")
            if was == is_now:
                continue
            if kind == "versions" or name == COMMIT or name.startswith(CODE_OF):  # short enough to be shown
                names.append(f"{what if kind == 'versions' else ''}{name} ({was}, now {is_now})")
            else:
                names.append(f"{what}{name}")
    return names


def _files_of(folder: Path, trust_remote_code: bool) -> list[Path]:
    """Return every file that may decide what is loaded.

    Unknown files count: one file too many can only cause a refusal, one too few a wrong result.
    """
    files = [file for file in folder.iterdir() if file.suffix != CODE]
    files += (folder / TEMPLATES).glob("*")
    files += folder.rglob(f"*{CODE}") if trust_remote_code else ()
    ignored = [file for file in files if file.name.startswith(".") or file.suffix.lower() in IGNORED]
    return sorted(file for file in set(files) - set(ignored) if file.is_file())


def _commit_to_use(source: str, known: str | None, say: Callable[[str], None]) -> str:
    """Return the known commit, or the newest one if none is known."""
    if known is None:
        return _commit(source, None)
    commit = _commit(source, known)
    newest = _newest(source)
    if newest not in (None, commit):
        say(f"model: {source} is now at commit {newest}; this folder goes on with {commit}, which it began with")
    return commit


def _commit(source: str, revision: str | None) -> str:
    """Return the commit of a revision, after a check that it holds a plain model."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    with refusing("model", source if revision is None else f"{source}@{revision}", {}):
        commit = extract_commit_hash(cached_file(source, "config.json", revision=revision), None)
        if commit is None:
            raise InvalidArgument("its commit is not known")
        adapters = cached_file(source, "adapter_config.json", revision=commit, **_OPTIONAL)
    if adapters is not None:
        raise InvalidArgument(f"source {source!r} is adapters on another model; expected a plain model")
    return commit


def _newest(source: str) -> str | None:
    """Return the newest commit on the hub, else the newest in the cache, else None."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        return extract_commit_hash(cached_file(source, "config.json", **_OPTIONAL), None)
    except OSError:
        return None


_OPTIONAL: Any = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def _hub_configs(source: str, commit: str) -> list[Path]:
    from transformers.utils import cached_file

    names = ("config.json", "tokenizer_config.json")
    found = [cached_file(source, name, revision=commit, **_OPTIONAL) for name in names]
    return [Path(file) for file in found if file is not None]


def _code_elsewhere(configs: Iterable[Path], trust_remote_code: bool) -> dict[str, str]:
    """Return the commits of other repositories whose code a config names.

    A config names code in another repository as "owner/name--module.Class".
    """
    if not trust_remote_code:
        return {}
    found: dict[str, str] = {}
    for config in configs:
        if not config.is_file():
            continue
        with refusing("config", str(config), {}):
            classes = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {})
        for name in json.dumps(classes).split('"'):
            if "--" in name:
                repository = name.partition("--")[0]
                found[CODE_OF + repository] = _commit_of_code(repository, name)
    return found


def _commit_of_code(repository: str, name: str) -> str:
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    module = name.partition("--")[2].partition(".")[0]
    with refusing("code", repository, {}):
        commit = extract_commit_hash(cached_file(repository, f"{module}.py"), None)
        if commit is None:
            raise InvalidArgument("its commit is not known")
    return commit


def _folder(files: Iterable[Path]) -> Path:
    """Return the outermost folder that holds one of the files."""
    return min((file.parent for file in files), key=lambda folder: len(folder.parts))


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str:
    if package == "gradpruner":
        from gradpruner.version import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
