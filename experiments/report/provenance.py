"""Where records come from: commit, versions, flags, command, and digests of inputs."""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence

from experiments.report.record import Provenance, digest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# Environment variables that change what a compiler makes.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_PACKAGES = ("jax", "jaxlib", "flax")
# What compiles for a platform, besides jaxlib.
_COMPILERS = {
    "cuda": ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin"),
    "tpu": ("libtpu",),
}


def collect(command: Sequence[str] | None = None) -> Provenance:
    """Returns the provenance of a record made now; `command` defaults to `sys.argv`."""
    commit, dirty = _commit()
    every = (*_PACKAGES, *(name for names in _COMPILERS.values() for name in names))
    now = datetime.datetime.now(datetime.UTC)
    return Provenance(
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        versions=_versions(every),
        flags=compiler_flags(),
        command=_command(list(sys.argv if command is None else command)),
        time=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def versions_for(target_platform: str) -> dict[str, str]:
    """Returns the versions that determine what is compiled for "cpu", "cuda", "tpu"."""
    return _versions((*_PACKAGES, *_COMPILERS.get(target_platform, ())))


def compiler_flags() -> dict[str, str]:
    """Returns the environment variables that change what a compiler makes."""
    return {name: os.environ[name] for name in _FLAGS if os.environ.get(name)}


@functools.cache
def code_digest(*paths: str) -> str:
    """Returns a digest of the source files under `paths` of the repository.

    A commit would change with every word of documentation, and says nothing about
    uncommitted changes; this changes exactly when the code does.
    """
    suffixes = (".py", ".pbtxt")
    files: list[pathlib.Path] = []
    for path in paths:
        found = ROOT / path
        files += sorted(found.rglob("*")) if found.is_dir() else [found]
    parts = [
        f"{file.relative_to(ROOT).as_posix()}\n{file.read_text(encoding='utf-8')}"
        for file in files
        if file.suffix in suffixes
    ]
    return digest("\n".join(parts))


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed compiled nothing
    return found


@functools.cache
def _commit() -> tuple[str, bool]:
    """Returns the commit and whether files differ from it.

    Without git, as in a copy of the files, the commit that GIT_COMMIT names, or the
    version installed, or "unknown"; the digest of the code in a record's context tells.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        version = _versions(["jaxllm"]).get("jaxllm")
        unknown = f"jaxllm {version}" if version else "unknown"
        return os.environ.get("GIT_COMMIT") or unknown, False


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ("git", "-C", str(ROOT), *arguments), capture_output=True, check=True, text=True
    )
    return done.stdout.strip()


def _command(argv: list[str]) -> str:
    """Returns the command as typed: `python -m experiments.tradeoff ...`."""
    program = pathlib.Path(argv[0])
    if program.suffix == ".py" and program.parent.name == "experiments":
        argv = ["python", "-m", f"experiments.{program.stem}", *argv[1:]]
    return shlex.join(argv)
